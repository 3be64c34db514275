"""What `check` passes trains: random legal configs, three steps each, with the real ranks, data and checkpoints.

`make prove` trains PHALANX_FUZZ_CASES configs (1,000 unless set) from seed PHALANX_FUZZ_SEED (0) on: about 2 s each on two
cores. A failure names the seed and the words, which `phalanx launch quickstart WORDS` repeats. Of those that have one answer by
nature, PHALANX_FUZZ_CASES / 5 are also held against one process, number by number.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Config
from parallel.layout import world_size
from parallel.legality.verdict import check_config
from pretrain.build import import_deepspeed
from pretrain.run.files import iterate_lines
from tests.ranks import RankFailed, run_ranks
from tests.run.fuzz_configs import configs
from tools.rehearse.reference import reference_micro_batch_seqs
from tools.rehearse.shrink import common_divisors, fit_degrees, shrink

PROVE_CASES = int(os.environ.get("PHALANX_FUZZ_CASES", "1000"))
FIRST_SEED = int(os.environ.get("PHALANX_FUZZ_SEED", "0"))
STEPS = 3
# Numbers of the record that no layout changes.
COMPARED = (
    "loss", "grad_norm", "val_loss", "mtp_loss", "aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss",
    "expert_load_max_over_mean", "dead_experts",
)  # fmt: skip


@pytest.fixture(scope="module")
def engines(monkeypatch_module: pytest.MonkeyPatch) -> None:
    """Imported once; torch's AdamW in place of DeepSpeed's, which is compiled for a minute."""
    import_deepspeed("cpu")
    monkeypatch_module.setattr("pretrain.engine.deepspeed_runtime.can_compile", lambda: False)


@pytest.fixture(scope="module")
def monkeypatch_module() -> object:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def attempt(words: list[str]) -> int:
    """One rank of a run, as torchrun starts it; returns its exit code."""
    os.environ["WANDB_MODE"] = "disabled"
    rank = importlib.import_module("pretrain.main")
    return rank.main(["--config", "quickstart", *words], rank.SIGNALS)


def record_of(words: list[str], ranks: int) -> list[dict[str, Any]]:
    """The record's rows of a whole run. Raises RankFailed."""
    folder = tempfile.mkdtemp(prefix="fuzz_")
    try:
        codes = run_ranks(ranks, attempt, [*words, f"run.dir={folder}"], timeout_s=120.0)
        if any(codes):
            raise RankFailed(f"exit codes {codes}")
        return [row for _, row in iterate_lines(Path(folder) / "metrics.jsonl") if row]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def failure_of(words: list[str], ranks: int) -> str | None:
    """Why a config does not train; None: it does, and its losses are numbers."""
    try:
        losses = [row["loss"] for row in record_of(words, ranks)]
    except RankFailed as error:
        return str(error)
    fine = len(losses) == STEPS and all(math.isfinite(loss) and 0 < loss < 20 for loss in losses)
    return None if fine else f"losses {losses}"


def has_one_answer(config: Config) -> bool:
    """Whether one process must give the numbers of this layout: it has no noise and computes in fp32. A capacity is that of a
    rank's micro-batch; with it neither tokens are cut over ranks nor several ranks' micro-batches balanced at once.
    """
    model, moe, parallel = config.model, config.model.moe, config.parallel
    noise = model.hidden_dropout or model.attention.dropout or (moe.num_experts and moe.router.jitter_eps)
    counts_several = parallel.tensor * parallel.context > 1 or moe.router.balance == "global_aux_loss"
    cut_by_rank = moe.num_experts and moe.capacity_factor and counts_several
    return not noise and not cut_by_rank and config.precision.params == "fp32"


def on_one_process(words: list[str], config: Config) -> list[str]:
    """The words of the same run on one process, its global batch cut as a rehearsal's reference cuts it."""
    layout = ("parallel", "zero", "launch.processes", "recompute", "batch.micro_batch_seqs")
    capacity = config.model.moe.num_experts and config.model.moe.capacity_factor
    micro_batch_seqs = config.batch.micro_batch_seqs if capacity else reference_micro_batch_seqs(config)
    single = ["parallel={pipeline: 1, expert: 1}", "zero.stage=0", "launch.processes_per_node=1"]
    return [*(word for word in words if not word.startswith(layout)), *single, f"batch.micro_batch_seqs={micro_batch_seqs}"]


def difference_of(words: list[str], config: Config) -> str | None:
    """What a layout gives that one process does not; None: they agree."""
    try:
        got, want = record_of(words, world_size(config)), record_of(on_one_process(words, config), 1)
    except RankFailed as error:
        return str(error)
    wrong = []
    for name in COMPARED:
        # The held-out loss stands in few rows, and a dense model has no experts' numbers.
        mine, reference = ([math.nan if row.get(name) is None else row[name] for row in rows] for rows in (got, want))
        if mine != pytest.approx(reference, rel=1e-4, abs=1e-6, nan_ok=True):
            wrong.append(f"{name} {mine} in place of {reference}")
    return "\n".join(wrong) or None


def train_all(first_seed: int, count: int, data: Path) -> list[str]:
    """The failures of `count` configs, each with its words and the end of its traceback."""
    failures = []
    for seed, words, config in configs(first_seed, count, data):
        failure = failure_of(words, world_size(config))
        if failure is not None:
            own = " ".join(f"'{word}'" for word in words[12:])
            failures.append(f"seed {seed}: {own}\n{failure[-1500:]}")
            print(failures[-1], flush=True)
    return failures


@pytest.mark.usefixtures("engines")
def test_what_check_passes_trains(folder: Path) -> None:
    failures = train_all(0, 6, folder)
    assert not failures, "\n\n".join(failures)


@pytest.mark.prove
@pytest.mark.timeout(6 * 3600)
@pytest.mark.usefixtures("engines")
def test_a_thousand_configs_that_check_passes_train(folder: Path) -> None:
    failures = train_all(FIRST_SEED, PROVE_CASES, folder)
    assert not failures, f"{len(failures)} of {PROVE_CASES}\n\n" + "\n\n".join(failures)


@pytest.mark.prove
@pytest.mark.timeout(6 * 3600)
@pytest.mark.usefixtures("engines")
def test_what_check_passes_gives_the_numbers_of_one_process(folder: Path) -> None:
    wrong, compared = [], 0
    for seed, words, config in configs(FIRST_SEED, PROVE_CASES // 5, folder):
        if not has_one_answer(config):
            continue
        compared += 1
        if (difference := difference_of(words, config)) is not None:
            wrong.append(f"seed {seed}: {words[12:]}\n{difference[-1500:]}")
            print(wrong[-1], flush=True)
    assert not wrong, f"{len(wrong)} of {compared}\n\n" + "\n\n".join(wrong)


def test_what_check_passes_can_be_rehearsed() -> None:
    """The small model of a legal config is legal, whatever was shrunk."""
    refused = []
    for seed, words, config in configs(10_000, 40, None):
        small = shrink(fitted := fit_degrees(config), common_divisors([fitted]))
        refused += [f"seed {seed}: {words[12:]}: {problem}" for problem in check_config(small).problems]
    assert not refused, "\n".join(refused)
