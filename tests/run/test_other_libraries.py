"""A run and a rehearsal across two versions of Megatron-Core: this interpreter's, and that of the other virtual environment.

`make test` has one environment, `make test-newest` has both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel.compat.index import is_needed
from pretrain.run.files import iterate_lines
from tests.run.world import ROOT, launch
from tools.rehearse import cli

WEIGHT_FAULT = "Router losses are weighted by the rank's own tokens when the loss is a sum over tokens"


def other_python() -> str:
    """The interpreter of the environment that this one is not."""
    here = Path(sys.prefix).resolve()
    found = [ROOT / name / "bin" / "python" for name in (".venv", ".venv-newest")]
    others = [python for python in found if python.exists() and python.parent.parent.resolve() != here]
    if not others:
        pytest.skip("there is no second virtual environment: make install-newest")
    return str(others[0])


def rehearse(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    layout = ["parallel.tensor=2", "parallel.pipeline=1", "parallel.expert=1", "launch.processes_per_node=2"]
    strong = ["model.moe.router.aux_loss_coeff=0.5", "model.moe.router.z_loss_coeff=0.01"]
    code = cli.main(["quickstart", "--steps", "2", *layout, *strong, "--against", other_python(), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_two_versions_agree_and_their_guards_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = rehearse([], capsys)
    assert code == 0, found
    assert found["here"]["versions"]["megatron-core"] != found["there"]["versions"]["megatron-core"]
    here, there = set(found["here"]["guards"]), set(found["there"]["guards"])
    assert (WEIGHT_FAULT in here) == is_needed(WEIGHT_FAULT) and WEIGHT_FAULT in here ^ there


def test_a_guard_that_is_on_or_off_by_mistake_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this side: a stale guard where the fault is gone, or none where it is there."""

    def stale(layout: Any) -> int:
        return layout.tensor * layout.context

    needed = is_needed(WEIGHT_FAULT)
    monkeypatch.setattr("pretrain.model.megatron_config.router_loss_weight", (lambda layout: 1) if needed else stale)
    code, found = rehearse([], capsys)
    (line,) = found["layouts"]
    assert code == 1 and line["first_difference"] and line["first_difference_rel"] > 1e-4


def test_a_run_goes_on_under_the_other_version_and_back(run_config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """4 of 12 steps here, 4 there, 4 here: the same record as a run that stayed, within a rehearsal's tolerance."""
    other = other_python()
    horizon = "schedule.horizon_steps=12"
    assert launch(run_config, tmp_path / "run", "run.steps=4", horizon).end() == 0
    for python, steps in ((other, 8), (sys.executable, 12)):
        command = [python, "-m", "tools.cli", "resume", str(tmp_path / "run"), f"run.steps={steps}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "libraries changed since the last attempt: megatron-core" in done.stderr
    got, want = (
        [row["loss"] for _, row in iterate_lines(path / "metrics.jsonl") if row] for path in (tmp_path / "run", undisturbed)
    )
    assert got == pytest.approx(want, rel=1e-5)
