"""phalanx data trace and ledger against what training really read: the tokens of real batches, kept by a hook in the engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

import pretrain.loop
import pretrain.training_data
from configs.load import to_yaml
from configs.schema import BlendPart, DataPhase, ValidSet
from launch.status import read_status
from pretrain.data.batches import MicroBatch
from pretrain.data.history import RunHistory
from pretrain.data.tokenizer import load_tokenizer, section_for
from pretrain.engine.megatron import MegatronEngine
from pretrain.run.folder import RunFolder
from tests.pretrain.data.conftest import write_pair
from tests.pretrain.test_train import rows
from tests.pretrain.world import exit_code, small_config, spoiling
from tests.ranks import RankFailed, run_ranks
from tools.cli import run as phalanx

SEQ = 32
STOP = 9
# Attempts: (ranks, words, samples that are spoiled, step after which the ranks die).
ATTEMPTS = (
    # Two data ranks, a growing batch; a rollback past a spoiled batch, then killed without a save.
    (2, ("divergence.nonfinite=rollback",), (14,), 5),
    # One rank, micro-batches of 2; a spoiled batch is skipped.
    (1, ("divergence.nonfinite=skip", "batch.micro_batch_seqs=2"), (45,), -1),
)


def one_rank(words: list[str], kept: Path, bad: tuple[int, ...], die_after: int) -> int:
    """A rank that keeps the tokens of each step's micro-batches in files: KEPT/STEP.CALL.RANK.npy, [sequences, s + 1]."""
    rate, step_of_engine = pretrain.loop.learning_rate, MegatronEngine.step
    place = {"step": 0, "call": 0}

    def at(step: int, *args: Any) -> float:
        if step == die_after:
            os._exit(9)
        place["step"] = step + 1
        return rate(step, *args)

    def step(engine: MegatronEngine, batches: list[MicroBatch], *args: Any) -> Any:
        place["call"] += 1
        full = [np.concatenate([one.tokens.numpy(), one.labels[:, -1:].numpy()], axis=1) for one in batches]
        path = kept / f"{place['step']}.{place['call']:03d}.{os.environ['RANK']}.npy"
        np.save(path, np.concatenate(full))
        return step_of_engine(engine, batches, *args)

    pretrain.loop.learning_rate, MegatronEngine.step = at, step  # pyright: ignore
    pretrain.training_data.micro_batches = spoiling(pretrain.training_data.micro_batches, bad)
    return exit_code(words)


@pytest.fixture(scope="module", params=["concatenate", pytest.param("best_fit", marks=pytest.mark.prove)])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, list[Path]]:
    """(run folder, the folders with the tokens of each attempt) of a run that was killed, rolled back, and changed its layout."""
    base = tmp_path_factory.mktemp("traced")
    random = np.random.default_rng(5)
    short = write_pair(base / "short", [random.integers(5, 200, random.integers(1, 90)).tolist() for _ in range(40)])
    made = small_config(model__vocab_size=None, schedule__horizon_steps=STOP, data__valid_fraction=0.1)
    made.data.tokenizer.path = str(folder / "tok.model")
    made.data.packing, made.data.document_mask = request.param, request.param == "best_fit"
    made.data.train = [BlendPart(str(folder / "embedded"), 0.3), BlendPart(short, 0.7)]
    made.batch.global_batch_seqs, made.batch.seq_length_tokens = 8, SEQ
    made.batch.ramp.start_seqs, made.batch.ramp.increment_seqs, made.batch.ramp.samples = 4, 2, 16
    made.data.phases = [DataPhase(46 * SEQ, [BlendPart(str(folder / "embedded"), 0.8), BlendPart(short, 0.2)])]
    made.data.valid_sets = [ValidSet("pieces", [BlendPart(short)], 1), ValidSet("unused", [BlendPart(short)])]
    made.run.steps, made.run.eval_batches, made.run.eval_interval_steps = STOP, 0, 3
    made.checkpoint.interval_steps, made.checkpoint.keep, made.checkpoint.asynchronous = 2, 0, False
    made.metrics.sinks = ["jsonl"]
    (base / "config.yaml").write_text(to_yaml(made))
    kept = []
    for number, (world, words, bad, die_after) in enumerate(ATTEMPTS):
        kept.append(base / f"kept_{number}")
        kept[-1].mkdir()
        begin = ["--config", str(base / "config.yaml"), f"run.dir={base / 'run'}", f"launch.processes_per_node={world}", *words]
        with suppress(RankFailed) if die_after >= 0 else nullcontext():
            run_ranks(world, one_rank, begin, kept[-1], bad, die_after)
    assert [row["step"] for row in rows(base / "run")] == list(range(1, STOP + 1))
    return base / "run", kept


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert phalanx(["data", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def read(documents: list[dict[str, Any]], source: str) -> list[int]:
    """The tokens of the traced documents, read by Megatron."""
    dataset, found = IndexedDataset(source), []
    for one in documents:
        sequence = int(dataset.document_indices[one["document"]])
        found += np.asarray(dataset.get(sequence, one["offset_tokens"], one["tokens"])).tolist()
    return found


def test_traced_documents_are_the_tokens_that_were_trained(
    traced: tuple[Path, list[Path]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, kept = traced
    eod = load_tokenizer(section_for(str(folder / "tok.model"))).eod_id
    traced_steps = asked(capsys, "trace", str(run_dir), "--step", f"1:{STOP}")["steps"]
    states = {(one["step"], one["state"]) for one in traced_steps}
    assert {(step, "trained") for step in range(1, STOP + 1) if step != 6} <= states, states
    assert any(state == "discarded" for _, state in states) and any(state == "skipped" for _, state in states)
    assert len({one["seqs"] for one in traced_steps}) > 1, "the batch has grown"
    for one in traced_steps:
        want = tokens_of(kept[one["attempt"] - 1], one)
        assert set(want) == {sample["data_rank"] for sample in one["samples"]}
        for rank, rows_of_rank in want.items():
            own = [sample for sample in one["samples"] if sample["data_rank"] == rank]
            got = [read(sample["documents"], sample["source"]) + [eod] * sample["room_tokens"] for sample in own]
            assert got == rows_of_rank.tolist()
        of_rank = asked(capsys, "trace", str(run_dir), "--step", str(one["step"]), "--rank", "0")["steps"]
        (same,) = [other for other in of_rank if other["first_sample"] == one["first_sample"]]
        assert same["samples"] == [sample for sample in one["samples"] if sample["data_rank"] == 0]


def tokens_of(kept: Path, step: dict[str, Any]) -> dict[int, np.ndarray]:
    """What each rank got in a step: the first call of the engine for a discarded step, the last for one that counts."""
    calls = sorted({path.name.split(".")[1] for path in kept.glob(f"{step['step']}.*.npy")})
    call = calls[0 if step["state"] == "discarded" else -1]
    return {int(path.name.split(".")[2]): np.load(path) for path in kept.glob(f"{step['step']}.{call}.*.npy")}


def tokens_in(sample: dict[str, Any]) -> int:
    """The inputs of a sample without padding."""
    return min(SEQ, SEQ + 1 - sample["room_tokens"])


def test_rows_have_the_losses_of_sources_and_of_named_sets(traced: tuple[Path, list[Path]]) -> None:
    run_dir, _ = traced
    for row in rows(run_dir):
        assert ("val_loss/pieces" in row) == (row["step"] % 3 == 0) and "val_loss" not in row and "val_loss/unused" not in row
    of_sources = [{key: row[key] for key in ("loss/embedded", "loss/short") if key in row} for row in rows(run_dir)]
    assert all(of_sources)
    for row, found in zip(rows(run_dir), of_sources, strict=True):
        if not row.get("skipped"):
            assert min(found.values()) - 1e-6 <= row["loss"] <= max(found.values()) + 1e-6
    status = read_status(RunFolder(run_dir))
    assert status.val_losses == {"pieces": rows(run_dir)[-1]["val_loss/pieces"]}


def test_a_document_is_seen_where_the_steps_say(traced: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = traced
    steps = asked(capsys, "trace", str(run_dir), "--step", f"1:{STOP}")["steps"]
    want: dict[int, set[tuple[int, int]]] = {}
    for step in steps:
        for sample in step["samples"]:
            for one in sample["documents"]:
                if sample["source"].endswith("short"):
                    want.setdefault(one["document"], set()).add((step["step"], sample["sample"]))
    for document in (*range(0, 40, 5), 36, 39):
        found = asked(capsys, "trace", str(run_dir), "--document", f"short:{document}")
        assert {(seen["step"], seen["sample"]) for seen in found["seen"]} == want.get(document, set()), document
        assert found["held_out"] == (document >= 36)
    assert len(want) > 25


def test_the_ledger_counts_what_the_steps_say(traced: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = traced
    found = asked(capsys, "ledger", str(run_dir))
    steps = asked(capsys, "trace", str(run_dir), "--step", f"1:{STOP}")["steps"]
    for source in found["sources"]:
        counted = dict.fromkeys(("trained", "skipped", "discarded"), 0)
        for step in steps:
            own = [sample for sample in step["samples"] if sample["source"] == source["source"]]
            counted[step["state"]] += sum(tokens_in(sample) for sample in own)
        assert source["trained_tokens"] == counted["trained"]
        assert source["passed_tokens"] == counted["skipped"] + counted["discarded"]
        assert source["epochs"] == pytest.approx(sum(counted.values()) / source["epoch_tokens"])
    total = sum(tokens_in(sample) for step in steps for sample in step["samples"])
    assert found["total"]["trained_tokens"] + found["total"]["passed_tokens"] == total <= rows(run_dir)[-1]["samples"] * SEQ
    assert found["total"]["planned_tokens"] == total, "the run is at its end"
    for row, before in zip(rows(run_dir)[1:], rows(run_dir)):
        of_step = [step for step in steps if step["step"] == row["step"] and step["state"] != "discarded"]
        assert row["tokens"] - before["tokens"] == sum(tokens_in(sample) for step in of_step for sample in step["samples"])
    late = [sample for step in steps if step["step"] > 7 for sample in step["samples"]]
    assert sum(sample["source"].endswith("short") for sample in late) < len(late) / 2, "the second phase has begun"


def test_steps_to_come_are_those_that_come(
    traced: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = traced
    young = shutil.copytree(run_dir, tmp_path / "young")
    lines = (young / "metrics.jsonl").read_text().splitlines(keepends=True)
    (young / "metrics.jsonl").write_text("".join(lines[:7]) + '{"step": 8, "sam')
    for step in range(8, STOP + 1):
        (want,), (got,) = (asked(capsys, "trace", str(path), "--step", str(step))["steps"] for path in (run_dir, young))
        assert got["state"] == "planned" and got["samples"] == want["samples"]
    ledgers = [asked(capsys, "ledger", str(path)) for path in (run_dir, young)]
    assert ledgers[0]["total"]["planned_tokens"] == ledgers[1]["total"]["planned_tokens"]
    assert ledgers[1]["step"] == 7
    stretches = list(RunHistory(RunFolder(run_dir)).stretches())
    assert sum(one.num_steps for one in stretches) == STOP and len(stretches) < STOP


def test_text_and_no_torch(traced: tuple[Path, list[Path]]) -> None:
    run_dir, _ = traced
    script = "import sys; from tools.cli import run; code = run(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    words = ["data", "trace", str(run_dir), "--step", "1", "--text"]
    shown = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("step 1: trained, attempt 1, samples 0 to 3\n  sample 0: ") and '\n      "' in shown


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trace", "RUN", "--step", "99"], "1 to 9; step 99 is none"),
        (["trace", "RUN", "--step", "2", "--rank", "5"], "0 to 1"),
        (["trace", "RUN", "--document", "short:40"], "0 to 39"),
        (["trace", "RUN", "--document", "other:1"], "must name a file of the run"),
        (["trace", "nowhere", "--step", "1"], "must be a run folder"),
        (["ledger", "nowhere"], "must be a run folder"),
    ],
)
def test_bad_input(traced: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str], words: list[str], part: str) -> None:
    run_dir, _ = traced
    assert phalanx(["data", *(str(run_dir) if word == "RUN" else word for word in words)]) == 2
    assert part in capsys.readouterr().err


def test_a_damaged_record_changes_nothing_that_is_whole(
    traced: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = traced
    broken = shutil.copytree(run_dir, tmp_path / "broken")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    odd = [
        '{"step": true, "samples": 3}\n',
        '{"step": -4, "samples": 8}\n',
        f'{{"step": 3, "samples": {10**30}}}\n',
        "[]\n",
        "\0\n",
    ]
    (broken / "metrics.jsonl").write_text("".join([*odd, *lines, '{"step": 10, "samples": "x"}\n', '{"st']))
    (broken / "events.jsonl").write_text((broken / "events.jsonl").read_text() + '{"kind": "rolled_back"}\n{"kind": 3}\n{')
    files = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    assert asked(capsys, "ledger", str(broken))["sources"] == asked(capsys, "ledger", str(run_dir))["sources"]
    words = ("--step", f"1:{STOP}")
    assert asked(capsys, "trace", str(broken), *words)["steps"] == asked(capsys, "trace", str(run_dir), *words)["steps"]
    assert files == {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}, "nothing is written"
    (broken / "launch" / "attempt_0001" / "config.yaml").write_text("run: [1")
    assert phalanx(["data", "trace", str(broken), "--step", "1"]) == 2
    assert "problem" in capsys.readouterr().err


def test_moved_and_changed_token_files(
    traced: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = traced
    moved = shutil.copytree(run_dir, tmp_path / "run")
    own = write_pair(tmp_path / "short", [[7] * 50] * 40)
    configs = [moved / "config.yaml", *moved.glob("launch/*/config.yaml")]
    for path in configs:
        path.write_text(path.read_text().replace(str(run_dir.parent / "short"), own))
    assert phalanx(["data", "trace", str(moved), "--step", "1"]) == 2
    assert "the .idx must be that of step" in capsys.readouterr().err
    for suffix in (".bin", ".idx"):
        Path(f"{own}{suffix}").unlink()
    assert phalanx(["data", "ledger", str(moved)]) == 2
    assert f"{own}.bin" in capsys.readouterr().err
