"""The README is run: its commands in order, in a copy of the tree; its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_config
from parallel.legality.zero_table import markdown

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FOLDERS = ("configs", "parallel", "pretrain", "launch", "tools")


def commands() -> list[str]:
    """Every line of the blocks marked sh."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def shortened(quickstart: str) -> str:
    """The quickstart of 6 steps of a quarter of its batch."""
    for words, fewer in (
        ("steps: 240", "steps: 6"),
        ("global_batch_seqs: 32", "global_batch_seqs: 8"),
        ("warmup_steps: 20", "warmup_steps: 2"),
    ):
        assert quickstart.count(f"  {words}\n") == 1, words
        quickstart = quickstart.replace(f"  {words}\n", f"  {fewer}\n")
    return quickstart


@pytest.mark.timeout(900)
def test_every_command_works(tmp_path: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path), "WANDB_MODE": "offline"}
    run = [command for command in commands() if command != "make test"]
    assert run[0] == "make demo", "the first thing that a newcomer types"
    # The environment is here already, and a few short steps show that the demo runs.
    run[0] = "make -o .venv/installed demo"
    quickstart = tmp_path / "configs" / "run" / "quickstart.yaml"
    quickstart.write_text(shortened(quickstart.read_text()))
    for command in run:
        result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    for name, step in (("quickstart", 6), ("first", 28), ("by_hand", 8)):
        outcome = json.loads((tmp_path / "runs" / name / "outcome.json").read_text())
        assert (outcome["state"], outcome["step"]) == ("finished", step)


def test_the_engine_table_is_the_one_that_check_decides_by() -> None:
    (shown,) = re.findall(r"<!-- zero table -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert shown == markdown()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_yaml_example_is_a_config(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example)
    assert load_config(str(tmp_path / "mine.yaml")).config.run.name == "mine"
