"""What `check` passes trains: random legal configs, three steps each, with the real ranks, data and checkpoints.

`make prove` trains PHALANX_FUZZ_CASES configs (1,000 unless set) from seed PHALANX_FUZZ_SEED (0) on: about 2 s each on two
cores. A failure names the seed and the words, which `phalanx launch quickstart WORDS` repeats.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from parallel.layout import world_size
from parallel.legality.verdict import check_config
from pretrain.build import import_deepspeed
from pretrain.run.files import iterate_lines
from tests.ranks import RankFailed, run_ranks
from tests.run.fuzz_configs import configs
from tools.rehearse.shrink import common_divisors, fit_degrees, shrink

PROVE_CASES = int(os.environ.get("PHALANX_FUZZ_CASES", "1000"))
FIRST_SEED = int(os.environ.get("PHALANX_FUZZ_SEED", "0"))
STEPS = 3


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


def failure_of(words: list[str], ranks: int) -> str | None:
    """Why a config does not train; None: it does, and its losses are numbers."""
    folder = tempfile.mkdtemp(prefix="fuzz_")
    try:
        codes = run_ranks(ranks, attempt, [*words, f"run.dir={folder}"], timeout_s=120.0)
        if any(codes):
            return f"exit codes {codes}"
        rows = [row for _, row in iterate_lines(Path(folder) / "metrics.jsonl") if row]
        losses = [row["loss"] for row in rows]
        fine = len(losses) == STEPS and all(math.isfinite(loss) and 0 < loss < 20 for loss in losses)
        return None if fine else f"losses {losses}"
    except RankFailed as error:
        return str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def test_what_check_passes_can_be_rehearsed() -> None:
    """The small model of a legal config is legal, whatever was shrunk."""
    refused = []
    for seed, words, config in configs(10_000, 40, None):
        small = shrink(fitted := fit_degrees(config), common_divisors([fitted]))
        refused += [f"seed {seed}: {words[12:]}: {problem}" for problem in check_config(small).problems]
    assert not refused, "\n".join(refused)
