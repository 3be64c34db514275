"""What goes wrong with files: refused with a reason, nothing half-written; and conversions that were killed go on."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configs.errors import ConfigError
from pretrain.checkpoint.tensor_file import read_header
from tests.tools.convert.test_families import assert_same_bits, run_export, run_import, tensors
from tests.tools.convert.tiny import make
from tools.cli import run
from tools.convert import file_plan, importing
from tools.convert.hf_config.preset import read_config
from tools.convert.hf_files import HfFiles
from tools.convert.output_folder import WorkShare
from tools.convert.tensors.dtypes import E4M3, dequantize_fp8, dequantize_mxfp4, from_float32, to_float32
from tools.convert.verify import verify

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    make("qwen3_moe", folder)
    return folder


@pytest.fixture
def hf(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "hf"))


def split(folder: Path) -> None:
    """Two shards and their index."""
    held = tensors(folder)
    names = sorted(held)
    (folder / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": names[:30], "model-00002-of-00002.safetensors": names[30:]}
    for file, part in files.items():
        save_file({name: held[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit(folder: Path, change: Any) -> None:
    held = tensors(folder)
    change(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "model.safetensors")


def refused(hf: Path, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_import(hf, hf.parent / "out")
    assert not list(hf.parent.glob("out*")), "nothing is written for input that is refused"


def test_shards_and_their_index(hf: Path, model: Path, tmp_path: Path) -> None:
    split(hf)
    run_import(hf, tmp_path / "checkpoint")
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(model, tmp_path / "out")


def test_a_missing_shard(hf: Path) -> None:
    split(hf)
    (hf / "model-00002-of-00002.safetensors").unlink()
    refused(hf, "model-00002-of-00002")


def test_an_index_that_names_absent_tensors(hf: Path) -> None:
    split(hf)
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.7.made_up"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(hf, "made_up")


def test_an_index_that_leads_out_of_the_folder(hf: Path) -> None:
    split(hf)
    path = hf / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    refused(hf, "own folder")


@pytest.mark.parametrize("length", [4, 600, -1])
def test_a_truncated_file(hf: Path, length: int) -> None:
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refused(hf, "model.safetensors")


def test_a_missing_an_extra_and_an_odd_tensor_are_said_at_once(hf: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        del held["model.layers.2.mlp.experts.5.up_proj.weight"]
        held["model.layers.0.surprise"] = torch.ones(3)
        held["model.norm.weight"] = torch.ones(41)

    edit(hf, change)
    with pytest.raises(ConfigError) as caught:
        run_import(hf, hf.parent / "out")
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "experts.5.up_proj" in text and "surprise" in text and "[40]" in text


def test_a_wrong_dtype(hf: Path) -> None:
    edit(hf, lambda held: held.update({"model.norm.weight": torch.ones(40, dtype=torch.int64)}))
    refused(hf, "must be of type")


def test_pickles_are_never_opened(hf: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (hf / "model.safetensors").unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(hf, "run code")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"model_type": "qwen3_moe"}', '{"model_type": 3}'])
def test_a_config_that_is_none(hf: Path, text: str) -> None:
    (hf / "config.json").write_text(text)
    refused(hf, "config.json|must be")


def test_output_is_not_overwritten_without_a_word(hf: Path, tmp_path: Path) -> None:
    run_import(hf, tmp_path / "checkpoint")
    before = (tmp_path / "checkpoint" / "manifest.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="--force"):
        run_import(hf, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "manifest.json").stat().st_mtime_ns == before
    assert run_import(hf, tmp_path / "checkpoint", force=True)["finished"]


def test_a_full_disk_is_one_report_and_the_rest_goes_on(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "FILE_BYTES", 20_000)
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); from tools.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    words = ["convert", "import", str(hf), str(tmp_path / "checkpoint")]
    done = subprocess.run([sys.executable, "-c", limited, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "then continues" in done.stderr
    assert not (tmp_path / "checkpoint").exists()


def test_a_killed_import_goes_on(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL between two files: what was complete is kept, the rest is written, the result is the same."""
    script = (
        "import sys, time; from tools.convert import importing, output_folder; importing.FILE_BYTES = 20_000;"
        "write = output_folder.OutputFolder._write_file\n"
        "def slow(self, *args): made = write(self, *args); time.sleep(0.2); return made\n"
        "output_folder.OutputFolder._write_file = slow\n"
        "from tools.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    words = ["convert", "import", str(hf), str(tmp_path / "checkpoint")]
    process = subprocess.Popen([sys.executable, "-c", script, *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    partial = tmp_path / "checkpoint.partial"
    while len(list(partial.glob("*.done"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob("part_*.safetensors")}
    monkeypatch.setattr(importing, "FILE_BYTES", 20_000)
    run_import(hf, tmp_path / "checkpoint")
    again = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "checkpoint").glob("part_*.safetensors")}
    assert len(again) > len(kept) >= 3 and all(again[name] == kept[name] for name in list(kept)[:2])
    assert not partial.exists() and not list((tmp_path / "checkpoint").glob(".*"))
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(hf, tmp_path / "out")


def test_shares_that_name_the_folder_differently_are_one_conversion(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "FILE_BYTES", 20_000)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(hf)
    assert not run_import(Path("hf"), Path("checkpoint"), share=WorkShare(0, 3))["finished"]
    assert not run_import(hf, tmp_path / "checkpoint", share=WorkShare(1, 3))["finished"]
    assert run_import(Path("link"), Path("../") / tmp_path.name / "checkpoint", share=WorkShare(2, 3))["finished"]
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(hf, tmp_path / "out")


def test_temporary_files_of_killed_tries_go_and_those_of_living_ones_stay(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "FILE_BYTES", 20_000)
    run_import(hf, tmp_path / "checkpoint", share=WorkShare(0, 3))
    dead, living = (tmp_path / "checkpoint.partial" / f".part_0000{n}.safetensors.99999{n}.tmp" for n in (1, 2))
    dead.write_bytes(bytes(1000))
    with open(living, "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run_import(hf, tmp_path / "checkpoint", share=WorkShare(1, 3))
        assert not dead.exists() and living.exists()
    assert run_import(hf, tmp_path / "checkpoint", share=WorkShare(2, 3))["finished"]
    assert not list((tmp_path / "checkpoint").glob(".*"))


def test_a_partial_of_another_source_is_not_mixed(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "FILE_BYTES", 20_000)
    run_import(hf, tmp_path / "checkpoint", share=WorkShare(0, 2))
    with pytest.raises(ConfigError, match="another unfinished conversion"):
        run_import(hf, tmp_path / "checkpoint", dtype="bf16")
    assert run_import(hf, tmp_path / "checkpoint", dtype="bf16", force=True)["finished"]


def test_shares_of_several_processes(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "FILE_BYTES", 20_000)
    done = [run_import(hf, tmp_path / "checkpoint", share=WorkShare(index, 3))["finished"] for index in (2, 0, 1)]
    assert done == [False, False, True]
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(hf, tmp_path / "out")


def test_more_shares_than_files(hf: Path, tmp_path: Path) -> None:
    """One small file: the share that has it waits for the others, so that none of them meets a finished OUT."""
    done = [run_import(hf, tmp_path / "checkpoint", share=WorkShare(index, 3))["finished"] for index in range(3)]
    assert done == [False, False, True] and not list((tmp_path / "checkpoint").glob("*.through"))
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(hf, tmp_path / "out")


def test_shares_at_once(hf: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tools.cli", "convert", "import", str(hf), str(tmp_path / "checkpoint"), "--json", "--shard"]
    shares = [subprocess.Popen([*words, f"{i}/3"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for i in range(3)]
    results = [json.loads(share.communicate()[0]) for share in shares]
    assert [share.returncode for share in shares] == [0, 0, 0] and any(result["finished"] for result in results)
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(hf, tmp_path / "out")


def test_what_is_read_is_never_replaced(hf: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in hf.iterdir())
    for out in (hf, hf.parent, hf / "inside", hf / ".." / "hf"):
        with pytest.raises(ConfigError, match="the source"):
            run_import(hf, out, force=True)
    assert sorted(path.name for path in hf.iterdir()) == before


def test_force_replaces_converted_models_only(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    for name in ("home", "file"):
        with pytest.raises(ConfigError, match="converted model only"):
            run_import(hf, tmp_path / name, force=True)
    (tmp_path / "home" / "thesis.txt").unlink()
    assert run_import(hf, tmp_path / "home", force=True)["finished"]


def test_a_disk_without_room_is_left_as_it_was(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
    refused(hf, "must have .* GiB free")


@pytest.mark.parametrize("header", [[], {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, {"a": 3}])
def test_a_header_that_is_none(header: Any, hf: Path) -> None:
    text = json.dumps(header).encode()
    (hf / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    refused(hf, "not of safetensors")


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([[0, 8], [0, 8]], "overlaps another tensor"),
        ([[0, 8], [4, 12]], "overlaps another tensor"),
        ([[0, 8], [12, 20]], "leaves 4 bytes before it unused"),
        ([[8, 16], [16, 24]], "leaves 8 bytes before it unused"),
        ([[0, 8], [8, 12]], "has another number of bytes"),
    ],
)
def test_offsets_that_overlap_or_leave_holes(offsets: list[list[int]], words: str, tmp_path: Path) -> None:
    """The library refuses the same files."""
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": pair} for name, pair in zip("ab", offsets)}
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(max(stop for _, stop in offsets)))
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(ConfigError, match=words):
        HfFiles(tmp_path, {})


@pytest.mark.parametrize(
    ("config", "file", "named"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, None, "awq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, None, "gptq"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, None, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, None, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, None, "modelopt"),
        ({"quantization_config": {"bits": 4}}, None, "4"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, None, "awq"),
        ({"compression_config": {"quant_method": "sparseml"}}, None, "sparseml"),
        ({}, ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}), "FP8"),
        ({}, ("quantize_config.json", {"bits": 4, "group_size": 128}), "4"),
    ],
)
def test_quantized_weights_are_refused_by_the_name_of_the_method(config: Any, file: Any, named: str, hf: Path) -> None:
    whole = read_config(hf)
    if "text_config" in config:
        whole = {"model_type": whole["model_type"], "text_config": whole | config["text_config"]}
    (hf / "config.json").write_text(json.dumps(whole | ({} if "text_config" in config else config)))
    if file:
        (hf / file[0]).write_text(json.dumps(file[1]))
    with pytest.raises(ConfigError, match="quantiz") as caught:
        run_import(hf, hf.parent / "out")
    (problem,) = caught.value.problems
    assert str(problem.got) == named
    assert not (hf.parent / "out").exists() and not (hf.parent / "out.partial").exists()


@pytest.mark.parametrize("share", [WorkShare(), WorkShare(0, 2)])
def test_values_that_overflow_fp16_are_refused_before_anything_is_written(share: WorkShare, hf: Path, tmp_path: Path) -> None:
    """65519 is the last value that rounds to a finite one."""

    def enlarge(held: Any) -> None:
        held["lm_head.weight"][3, 7] = -7e4
        held["model.layers.2.mlp.experts.1.down_proj.weight"][5, 2] = 1e30
        held["model.embed_tokens.weight"][0, 0] = 65519.0

    run_import(hf, tmp_path / "finite", dtype="fp16")
    edit(hf, enlarge)
    run_import(hf, tmp_path / "checkpoint")
    for convert in (lambda: run_import(hf, tmp_path / "out", dtype="fp16", share=share),
                    lambda: run_export(tmp_path / "checkpoint", tmp_path / "out", dtype="fp16", share=share)):  # fmt: skip
        with pytest.raises(ConfigError, match="65504") as caught:
            convert()
        assert list(caught.value.problems[0].got.values()) == ["1e+30", "70000"]
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_fp64_values_that_overflow_fp32_are_refused(hf: Path, tmp_path: Path) -> None:
    held = {name: tensor.double() for name, tensor in tensors(hf).items()}
    held["lm_head.weight"][0, 0] = 1e39
    save_file(held, hf / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("bf16", "fp32"):
        with pytest.raises(ConfigError, match=r"output_layer\.weight.*1e\+39"):
            run_import(hf, tmp_path / "out", dtype=dtype)
    assert run_import(hf, tmp_path / "out")["finished"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"vocab_size": 17179869184', "vocab_size"),
        ('"num_experts": 10000000', "num_experts"),
        ('"num_hidden_layers": 1000000000', "num_hidden_layers"),
        ('"num_experts_per_tok": 100000000', "num_experts_per_tok"),
        ('"hidden_size": 1099511627776', "hidden_size"),
        ('"rms_norm_eps": Infinity', "must be JSON"),
        ('"rms_norm_eps": NaN', "must be JSON"),
        ('"rope_theta": 1e999', "1e999 is not a finite number"),
    ],
)
def test_absurd_values_are_refused_at_once(text: str, words: str, hf: Path) -> None:
    whole = json.dumps({**read_config(hf), "num_local_experts": None} if "num_experts" in text else read_config(hf))
    (hf / "config.json").write_text(f"{whole[:-1]}, {text}}}")
    start_s = time.monotonic()
    refused(hf, words)
    assert time.monotonic() - start_s < 5


@pytest.mark.parametrize("name", ["a" * 5000 + ".safetensors", "", "..", "a\0b.safetensors"])
def test_names_that_no_file_can_have(name: str, hf: Path) -> None:
    split(hf)
    index = hf / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match="files of its own folder") as caught:
        run_import(hf, hf.parent / "out")
    assert len(str(caught.value)) < 1000


def test_a_header_larger_than_the_librarys_limit_is_not_read(hf: Path) -> None:
    with open(hf / "model.safetensors", "wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    refused(hf, "a header has at most 100000000 bytes")


def test_a_folder_that_is_wrong_throughout_is_a_short_report(hf: Path) -> None:
    (hf / "config.json").write_text(json.dumps(read_config(hf) | {"hidden_size": 44}))
    with pytest.raises(ConfigError, match="46 more") as caught:
        run_import(hf, hf.parent / "out")
    assert len(caught.value.problems) == 17


def test_factors_of_a_tensor_that_is_not_packed_are_not_dropped(hf: Path) -> None:
    edit(hf, lambda held: held.update({"model.layers.0.self_attn.o_proj.weight_scale_inv": torch.ones(1, 1)}))
    refused(hf, "would be lost")


@pytest.mark.parametrize("block", [["a", "b"], [0, 0], 128])
def test_odd_blocks(block: Any, hf: Path) -> None:
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    (hf / "config.json").write_text(json.dumps(read_config(hf) | quantized))
    refused(hf, "weight_block_size")


def test_verify_wants_the_same_number_of_layers(hf: Path, tmp_path: Path) -> None:
    run_import(hf, tmp_path / "checkpoint")
    make("qwen3_moe", tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(ConfigError, match="3 layers"):
        verify(tmp_path / "checkpoint", tmp_path / "deeper", None, 1, 8, 1e-3)
    edit(hf, lambda held: held.pop("model.norm.weight"))
    with pytest.raises(ConfigError, match="lack"):
        verify(tmp_path / "checkpoint", hf, None, 1, 8, 1e-3)
    (hf / "config.json").write_text(json.dumps(read_config(hf) | {"norm_topk_prob": None}))
    with pytest.raises(ConfigError, match="norm_topk_prob"):
        verify(tmp_path / "checkpoint", hf, None, 1, 8, 1e-3)


def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("UNIT_BYTES", 4000), ("BLOCK_BYTES", 700), ("SMALL_BYTES", 300)):
        monkeypatch.setattr(file_plan, name, size)


@pytest.mark.parametrize("place", ["first", "padding", "last"])
def test_damage_is_found_wherever_it_is(place: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices are summed while they are read, by several threads, some of them in part; vocabulary padding isn't read at all."""
    run_import(hf, tmp_path / "checkpoint")
    (file,) = (tmp_path / "checkpoint").glob("part_*.safetensors")
    header = read_header(file)
    (table,) = (entry for key, entry in header.items() if "word_embeddings" in key)
    at = {"first": table.start + 5, "padding": table.start + 100 * 40 * 4, "last": table.start + 90 * 40 * 4 - 1}[place]
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    small_units(monkeypatch)
    for workers in (1, 3):
        with pytest.raises(ConfigError, match="other bytes than were written"):
            run_export(tmp_path / "checkpoint", tmp_path / "out", workers=workers)
        assert not (tmp_path / "out").exists() and not list((tmp_path / "out.partial").glob("*.done"))


def test_large_tensors_are_cut_into_units(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch)
    run_import(hf, tmp_path / "checkpoint")
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(hf, tmp_path / "out")


def test_a_damaged_checkpoint_is_refused(hf: Path, tmp_path: Path) -> None:
    run_import(hf, tmp_path / "checkpoint")
    (file,) = (tmp_path / "checkpoint").glob("part_*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-7] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match="other bytes than were written"):
        run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(["convert", "inspect", str(tmp_path / "checkpoint")]) == 2


def test_the_commands(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "out")
    assert run(["convert", "import", str(hf), checkpoint, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "qwen3_moe"
    assert run(["convert", "export", checkpoint, out, "--dtype", "bf16", "--json"]) == 0
    capsys.readouterr()
    assert run(["convert", "inspect", out, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["dtypes"]) == {"BF16"}
    assert run(["convert", "verify", checkpoint, str(hf), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_diff"] < 1e-4
    assert run(["convert", "verify", checkpoint, str(tmp_path / "nowhere")]) == 2
    assert run(["convert", "export", str(tmp_path), str(tmp_path / "else")]) == 2
    assert "COMPLETE" in capsys.readouterr().err


def test_verify_ends_with_1_when_the_models_differ(hf: Path, tmp_path: Path) -> None:
    run_import(hf, tmp_path / "checkpoint")
    edit(hf, lambda held: held["model.layers.0.self_attn.o_proj.weight"].mul_(0.9))
    assert run(["convert", "verify", str(tmp_path / "checkpoint"), str(hf)]) == 1


# Element types.


def test_bf16_rounds_like_torch() -> None:
    values = torch.cat(
        [torch.randn(5000) * 10.0 ** torch.randint(-38, 38, (5000,)), torch.tensor([0.0, -0.0, torch.inf, torch.nan])]
    )
    ours = from_float32(values.numpy(), "BF16")
    theirs = values.to(torch.bfloat16)
    # Any NaN is as good as another.
    assert np.array_equal(ours[:-1], theirs.view(torch.uint16).numpy()[:-1])
    assert np.array_equal(to_float32(ours, "BF16"), theirs.float().numpy(), equal_nan=True)


def test_fp8_table_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True)


def test_fp8_blocks_bit_for_bit() -> None:
    weight = torch.randn(300, 200).to(torch.float8_e4m3fn)
    factors = torch.rand(3, 2) + 0.5
    wide = factors.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    expected = (weight.float() * wide).to(torch.bfloat16).view(torch.uint16).numpy()
    codes = weight.view(torch.uint8).numpy()
    assert np.array_equal(dequantize_fp8(codes, factors.numpy(), 0, (128, 128)), expected)
    assert np.array_equal(dequantize_fp8(codes[100:290], factors.numpy(), 100, (128, 128)), expected[100:290])


def test_mxfp4_is_transformers_own() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: PLC0415  (heavy)

    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 6, 3), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales).transpose(1, 2).contiguous()
    for expert in range(2):
        ours = dequantize_mxfp4(blocks[expert].numpy(), scales[expert].numpy())
        assert np.array_equal(ours, expected[expert].view(torch.uint16).numpy())


def test_an_fp8_model_is_read_as_its_dequantised_self(tmp_path: Path) -> None:
    """DeepSeek's files: blocks of fp8 with factors beside some of the weights."""
    make("deepseek_v3", tmp_path / "hf")
    held, plain, packed = load_file(tmp_path / "hf" / "model.safetensors"), {}, {}
    for name, tensor in held.items():
        if name.endswith("_proj.weight"):
            factors = torch.rand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)) + 0.1
            codes = (tensor / factors[0, 0]).to(torch.float8_e4m3fn)
            packed |= {name: codes, name + "_scale_inv": factors}
            plain[name] = (codes.float() * factors[0, 0]).to(torch.bfloat16)
        else:
            kept = tensor if "e_score" in name else tensor.to(torch.bfloat16)
            packed[name] = plain[name] = kept
    config = read_config(tmp_path / "hf") | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    for folder, values in (("packed", packed), ("plain", plain)):
        (tmp_path / folder).mkdir()
        save_file(values, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    run_import(tmp_path / "packed", tmp_path / "checkpoint")
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "plain", tmp_path / "out")
    assert "quantization_config" not in read_config(tmp_path / "out")
    verdict = verify(tmp_path / "checkpoint", tmp_path / "packed", None, 2, 24, 1e-3)
    assert verdict["ok"] and verdict["max_abs_diff"] < 1e-4
    del packed[next(name for name in packed if name.endswith("_scale_inv"))]
    save_file(packed, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(ConfigError, match="fp8 needs"):
        run_import(tmp_path / "packed", tmp_path / "checkpoint", force=True)


def test_a_packed_gpt_oss_is_read_as_its_dequantised_self(tmp_path: Path) -> None:
    """OpenAI's files: MXFP4 experts, rows of gate and up in turn, not transposed as transformers holds them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: PLC0415  (heavy)

    make("gpt_oss", tmp_path / "hf", hidden_size=64, intermediate_size=32)
    held = load_file(tmp_path / "hf" / "model.safetensors")
    plain = {name: tensor.to(torch.bfloat16) for name, tensor in held.items()}
    packed = dict(plain)
    generator = torch.Generator().manual_seed(0)
    for name in held:
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = held[name].shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(120, 126, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
            del packed[name]
            packed |= {name + "_blocks": blocks, name + "_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    for folder, values in (("packed", packed), ("plain", plain)):
        (tmp_path / folder).mkdir()
        save_file(values, tmp_path / folder / "model.safetensors")
        shutil.copy(tmp_path / "hf" / "config.json", tmp_path / folder)
    run_import(tmp_path / "packed", tmp_path / "checkpoint")
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "plain", tmp_path / "out")
