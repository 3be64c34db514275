"""`phalanx rehearse --against PYTHON`: the same layouts under two interpreters' libraries."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from tools.rehearse import cli

QUICK = ["quickstart", "--steps", "2", "parallel.tensor=2", "parallel.pipeline=1", "parallel.expert=1"]
TWO_RANKS = [*QUICK, "launch.processes_per_node=2", "model.moe.router.aux_loss_coeff=0.5"]


def rehearse(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = cli.main([*TWO_RANKS, *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_same_libraries_are_bit_equal_and_a_missing_guard_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, found = rehearse(["--against", sys.executable], capsys)
    (line,) = found["layouts"]
    assert code == 0 and line["bit_equal"] and line["loss"]["here"] == line["loss"]["there"]
    assert found["here"] == found["there"] and found["here"]["guards"]

    # A guard that is off on this side only: both versions need it.
    monkeypatch.setattr("pretrain.model.megatron_config.router_loss_weight", lambda *args: 3)
    code, found = rehearse(["--against", sys.executable], capsys)
    (line,) = found["layouts"]
    assert code == 1 and not line["ok"]
    # In model order the embedding is the first tensor that the router's gradient reaches.
    assert line["first_difference"] == "embedding.word_embeddings.weight" and line["first_difference_rel"] > 1e-4


def test_libraries_that_cannot_be_imported_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "megatron" / "core"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('a broken library')\n")
    (broken / "package_info.py").write_text("MAJOR = 0\nMINOR = 19\nPATCH = 2\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match="ends with: ImportError: a broken library"):
        cli.main([*TWO_RANKS, "--against", sys.executable])
    (broken / "package_info.py").write_text("MAJOR = 0\nMINOR = 42\nPATCH = 0\n")
    with pytest.raises(ConfigError, match=r"megatron-core = '0\.42\.0' rule: must be a tested version"):
        cli.main([*TWO_RANKS, "--against", sys.executable])


@pytest.mark.parametrize("python", ["no/such/python", "/dev/null"])
def test_what_is_no_interpreter_is_refused(python: str) -> None:
    with pytest.raises(ConfigError, match="must be a Python interpreter that can be started"):
        cli.main([*TWO_RANKS, "--against", python])


def test_a_program_that_is_no_python_is_refused() -> None:
    with pytest.raises(ConfigError, match="--against"):
        cli.main([*TWO_RANKS, "--against", "true"])
