"""A Megatron-LM torch_dist checkpoint becomes ours: the same logits, whatever ranks wrote it; nothing of it is ever run."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from configs.errors import ConfigError
from parallel.layout import Layout
from tests.ranks import run_ranks
from tests.tools.convert.megatron_lm import KINDS, LENGTH, PADDED, is_vocab, save, tokens_of
from tools.cli import run
from tools.convert.checkpoints import model_of, open_manifest
from tools.convert.hf_config.preset import preset_yaml
from tools.convert.importing import import_model
from tools.convert.megatron_lm.arguments import read_args
from tools.convert.megatron_model import loaded_model, logits_of
from tools.convert.output_folder import WorkShare

TWO: dict[str, Any] = {"processes_per_node": 2}
CASES = [
    ("moe", Layout(), None),
    ("dense", Layout(tensor=2, **TWO), None),
    ("mixed", Layout(expert=2, **TWO), None),
    ("mixed", Layout(), {"singleton_local_shards": True}),
    ("moe", Layout(pipeline=2, **TWO), None),
    ("moe", Layout(expert=2, **TWO), {"singleton_local_shards": True}),
]


def run_import(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    return import_model(folder, out, **{"dtype": "keep", "share": WorkShare(), "workers": 2, "force": False} | options)


def our_logits(checkpoint: Path) -> torch.Tensor:
    return ours(checkpoint)[0]


def ours(checkpoint: Path) -> tuple[torch.Tensor, NDArray[np.float32]]:
    """(logits [b, s, vocab], every number of the model, sorted) of a checkpoint."""
    model = model_of(open_manifest(checkpoint))
    with loaded_model(checkpoint, model, LENGTH) as chunk:
        tensors = [*chunk.named_parameters(), *(pair for pair in chunk.named_buffers() if "expert_bias" in pair[0])]
        held = [tensor.detach()[: 90 if is_vocab(name) else None] for name, tensor in tensors]
        return logits_of(chunk, tokens_of()), np.sort(np.concatenate([tensor.numpy().ravel() for tensor in held]))


@pytest.mark.parametrize(("kind", "layout", "metadata"), CASES, ids=lambda value: getattr(value, "describe", lambda: value)())
def test_logits_and_numbers_are_those_of_the_model_that_was_saved(
    kind: str, layout: Layout, metadata: Any, tmp_path: Path
) -> None:
    """Numbers bit for bit. The two models add up their products in another order, so that logits differ by rounding."""
    expected = run_ranks(layout.world_size, save, tmp_path / "mlm", kind, layout, metadata)
    done = run_import(tmp_path / "mlm", tmp_path / "checkpoint")
    assert done["finished"] and done["family"] == "megatron-lm" and not done["notes"]
    our_logits, our_numbers = ours(tmp_path / "checkpoint")
    assert our_logits.shape[-1] == 90 < PADDED
    for logits in (torch.from_numpy(made) for made in expected if made is not None):
        assert logits.abs().max() > 1 and (our_logits - logits[..., :90]).abs().max() < 5e-5
    numbers = [np.load(tmp_path / f"numbers_{rank}.npy") for rank in range(layout.world_size)]
    assert len(np.unique(our_numbers)) > 0.9 * len(our_numbers)
    np.testing.assert_array_equal(our_numbers, np.sort(np.concatenate(numbers)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "mlm"
    run_ranks(1, save, folder, "moe", Layout(), None)
    return folder / "iter_0000007"


@pytest.fixture
def saved(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "mlm"))


def set_args(folder: Path, **changes: Any) -> None:
    torch.save({"args": Namespace(**{**KINDS["moe"], **changes}), "iteration": 7}, folder / "common.pt")


def refused(folder: Path, words: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        run_import(folder, folder.parent / "out", **options)
    assert not list(folder.parent.glob("out*")), "nothing is written for input that is refused"


# Pickles that would act when they are loaded, in each of the places that hold one.


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def plant_in_metadata(folder: Path, bomb: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(bomb))


def plant_beside_metadata(folder: Path, bomb: Any) -> None:
    held = pickle.loads((folder / ".metadata").read_bytes())
    held.planner_data = [bomb]
    (folder / ".metadata").write_bytes(pickle.dumps(held))


def plant_in_args(folder: Path, bomb: Any) -> None:
    set_args(folder, unused=bomb)


def move_into_distcp(folder: Path) -> None:
    """common.pt as a byte range of a .distcp file, as Megatron-Core 0.19 writes it."""
    raw = (folder / "common.pt").read_bytes()
    (folder / "__9_0.distcp").write_bytes(b"other bytes" + raw)
    (folder / "common.pt").unlink()
    held = pickle.loads((folder / ".metadata").read_bytes())
    held.storage_data = {index: info for index, info in held.storage_data.items() if not index.fqn.startswith("common_state")}
    place = copy.copy(next(iter(held.storage_data.values())))
    place.relative_path, place.offset, place.length = "__9_0.distcp", 11, len(raw)
    held.storage_data[dataclasses.replace(next(iter(held.storage_data)), fqn="common_state/shard_0_1")] = place
    (folder / ".metadata").write_bytes(pickle.dumps(held))


def plant_in_distcp(folder: Path, bomb: Any) -> None:
    set_args(folder, unused=bomb)
    move_into_distcp(folder)


PLANTED = [plant_in_metadata, plant_beside_metadata, plant_in_args, plant_in_distcp]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_malicious_pickle_is_refused_and_not_run(plant: Callable[[Path, Any], None], saved: Path, tmp_path: Path) -> None:
    plant(saved, Bomb(tmp_path / "exploded"))
    refused(saved, r"posix\.mkdir")
    assert not (tmp_path / "exploded").exists()


def test_a_malicious_chunk_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    """One tensor's zip is exchanged for one with another pickle; the others stay."""
    held = pickle.loads((saved / ".metadata").read_bytes())
    (index,) = (index for index in held.storage_data if index.fqn == "decoder.final_layernorm.weight")
    with zipfile.ZipFile(saved / "__9_9.distcp", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(tmp_path / "exploded"), protocol=2))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(160))
    place = held.storage_data[index]
    place.relative_path, place.offset, place.length = "__9_9.distcp", 0, (saved / "__9_9.distcp").stat().st_size
    (saved / ".metadata").write_bytes(pickle.dumps(held))
    refused(saved, r"posix\.mkdir")
    assert not (tmp_path / "exploded").exists()


# Settings that would silently change the answer, and files that are not whole.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"apply_layernorm_1p": True}, r"1 \+ weight"),
        ({"position_embedding_type": "mrope"}, "mrope"),
        ({"hidden_size": None}, "must be present"),
        ({"num_layers": "two"}, "type int"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "aux_loss"),
        ({"moe_layer_freq": "[0]*3"}, "zeros and ones"),
        ({"moe_layer_freq": "__import__('os').mkdir('x')"}, "zeros and ones"),
        ({"moe_ffn_hidden_size": 32}, "by the model"),
        ({"num_experts": 6}, "by the model|must be"),
        ({"num_layers": 3}, "by the model|doesn't hold"),
        ({"moe_shared_expert_intermediate_size": None}, "would be lost"),
        ({"qk_layernorm": False, "add_qkv_bias": False}, "would be lost"),
    ],
)
def test_args_that_do_not_fit_are_refused(changes: dict[str, Any], words: str, saved: Path) -> None:
    set_args(saved, **changes)
    refused(saved, words)


def test_arguments_inside_of_a_distcp_file_are_read(saved: Path, tmp_path: Path) -> None:
    set_args(saved)
    run_import(saved, tmp_path / "first")
    move_into_distcp(saved)
    run_import(saved, tmp_path / "second")
    assert torch.equal(our_logits(tmp_path / "first"), our_logits(tmp_path / "second"))
    held = pickle.loads((saved / ".metadata").read_bytes())
    for info in held.storage_data.values():
        info.relative_path = "../" + info.relative_path if info.relative_path == "__9_0.distcp" else info.relative_path
    (saved / ".metadata").write_bytes(pickle.dumps(held))
    refused(saved, "common_state lies")


def test_files_that_are_missing_or_cut(saved: Path) -> None:
    # Megatron-Core 0.19 writes one file for all ranks of a machine, earlier versions two.
    *_, file = sorted(saved.glob("*.distcp"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(saved, "bytes long")
    file.unlink()
    refused(saved, "missing")
    file.write_bytes(bytes(len(whole)))
    refused(saved, "torch.save")


def test_other_formats_are_named(saved: Path) -> None:
    (saved / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    refused(saved, "torch_dist")
    (saved.parent / "old" / "mp_rank_00").mkdir(parents=True)
    refused(saved.parent / "old", "runs code")


def test_a_preset_states_the_model_where_the_checkpoint_does_not(saved: Path, tmp_path: Path) -> None:
    run_import(saved, tmp_path / "first")
    torch.save({"iteration": 7}, saved / "common.pt")
    refused(saved, "--model")
    model = read_args(KINDS["moe"])[0]
    (tmp_path / "preset.yaml").write_text(preset_yaml(model))
    run_import(saved, tmp_path / "second", preset=str(tmp_path / "preset.yaml"))
    assert torch.equal(our_logits(tmp_path / "first"), our_logits(tmp_path / "second"))
    (tmp_path / "preset.yaml").write_text("model: {hidden_size: 48, vocab_size: 90}")
    refused(saved, "by the model|doesn't hold", preset=str(tmp_path / "preset.yaml"))


def test_the_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "import", str(saved), str(tmp_path / "out"), "--dtype", "bf16", "--json"]) == 0
    assert '"megatron-lm"' in capsys.readouterr().out
    assert run(["convert", "inspect", str(tmp_path / "out")]) == 0
    assert run(["convert", "import", str(tmp_path / "out"), str(tmp_path / "again")]) == 2


def test_a_typed_layer_pattern_is_read() -> None:
    model, problems, _ = read_args({**KINDS["mixed"], "moe_layer_freq": "([0]*1+[1]*2)*1"})
    assert not problems and model.moe.layer_pattern == [0, 1, 1]
