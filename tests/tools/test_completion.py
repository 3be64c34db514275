"""The completion script, as bash itself completes with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import cli, completion


@pytest.fixture(scope="module")
def script() -> str:
    return completion.script("bash")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("phalanx pla", {"plan", "plan-validate"}),
        ("phalanx check quick", {"quickstart", "quickstart_muon"}),
        ("phalanx launch --dry", {"--dry-run"}),
        ("phalanx data token", {"tokenizer", "tokenize"}),
        ("phalanx data tokenize --eo", {"--eod"}),
        ("phalanx status runs/", {"runs/first"}),
    ],
)
def test_bash_completes(script: str, words: str, wanted: set[str], tmp_path: Path) -> None:
    (tmp_path / "runs/first").mkdir(parents=True)
    complete = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _phalanx; printf "%s\\n" "${COMPREPLY[@]}"'
    typed = f"{script}\nCOMP_WORDS=({words}); {complete}"
    done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert set(done.stdout.split()) == wanted and not done.stderr


def test_every_command_is_in_the_script(script: str) -> None:
    assert all(f'"{name} "*' in script for name in cli.COMMANDS)
    assert completion.script("zsh").endswith(script)
