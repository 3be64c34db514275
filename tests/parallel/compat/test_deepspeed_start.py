"""DeepSpeed in a process that its own launcher did not start: what is bound, what is not compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

ROOT = Path(__file__).resolve().parents[3]


def test_a_lock_left_by_a_killed_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own lock waits until the file is gone: for ever, when its owner was killed."""
    from parallel.compat.deepspeed import operators as deepspeed_operators  # noqa: PLC0415  (after the fixture)

    locks = []

    class Builder:
        name = "an_operator"

        def load(self, verbose: bool) -> None:
            locks.append((tmp_path / self.name / "lock").exists())

    monkeypatch.setattr(deepspeed_operators, "_get_build_directory", lambda name, verbose: str(tmp_path / name))
    (tmp_path / "an_operator").mkdir()
    (tmp_path / "an_operator" / "lock").touch()
    deepspeed_operators.build_operator(Builder())
    deepspeed_operators.build_operator(Builder())
    assert locks == [False, False]


IMPORTS = """
import os, sys, torch
os.environ["DS_ACCELERATOR"] = "cpu"
compiled = []
torch.compile = lambda *args, **kwargs: compiled.append(args) or (lambda function: function)
{}
assert not compiled, compiled
"""


@pytest.mark.parametrize(
    ("module", "compiles"),
    [("parallel.compat.deepspeed.guards", False), ("deepspeed.runtime.zero.muon.muon_optimizer", True)],
    ids=["guarded", "unguarded"],
)
def test_nothing_is_compiled_by_an_import(module: str, compiles: bool) -> None:
    script = IMPORTS.format(f"import {module}")
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ("AssertionError" in result.stderr) is compiles, result.stderr
    assert (result.returncode == 0) is not compiles


def probed(guard: bool) -> bool:
    """Does reading the names of DeepSpeed's operators look for compilers?"""
    import deepspeed.ops  # noqa: PLC0415  (after the fixture)

    from parallel.compat.deepspeed.start import name_no_operators  # noqa: PLC0415

    probes: list[bool] = []
    deepspeed.ops.__dict__.pop("__compatible_ops__", None)  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.ops._probe_compatible_ops = lambda: probes.append(True) or {}  # type: ignore[attr-defined]
    if guard:
        name_no_operators()
    assert deepspeed.ops.__compatible_ops__ == {}  # type: ignore[attr-defined]
    return bool(probes)


def bound(guard: bool) -> bool:
    """Is the name that DeepSpeed's engine reads for collectives a module?"""
    import deepspeed  # noqa: PLC0415  (after the fixture)

    from parallel.compat.deepspeed.start import bind_communication  # noqa: PLC0415

    deepspeed.dist = None  # type: ignore[attr-defined]
    if guard:
        bind_communication()
    return hasattr(deepspeed.dist, "all_reduce")  # type: ignore[attr-defined]


def on_a_rank(program: Callable[[bool], Any], guard: bool) -> Any:
    """In a process of its own, so that nothing stays changed here."""
    return run_ranks(1, program, guard)[0]


def test_no_operator_is_probed() -> None:
    assert on_a_rank(probed, False) and not on_a_rank(probed, True)


def test_communication_is_bound_without_deepspeeds_launcher() -> None:
    assert not on_a_rank(bound, False) and on_a_rank(bound, True)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
