"""What is used where torch isn't installed, as on a login node. `make prove-python313` runs it under Debian's own Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from configs.sources import shipped_names

pytestmark = [pytest.mark.prove, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "parallel", "pretrain", "launch", "tools", "tests", "docs")


def phalanx(folder: Path, *words: str, code: int = 0) -> str:
    """Its output. `-X importtime` tells what the command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "tools.cli", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "configs" in imported and not imported & {"torch", "megatron", "deepspeed"}, words
    return done.stdout


def test_every_file_compiles_without_a_warning() -> None:
    files = [ROOT / "setup.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 300
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in files:
            compile(path.read_bytes(), path, "exec")


def test_data_is_made_and_a_run_is_checked_on_it(tmp_path: Path) -> None:
    phalanx(tmp_path, "data", "tokenizer", "--corpus", "embedded", "--vocab-size", "600", "--max-mb", "0.3", "--out", "t.model")
    encode = ["data", "tokenize", "--corpus", "embedded", "--max-mb", "0.3", "--tokenizer", "t.model"]
    phalanx(tmp_path, *encode, "--workers", "2", "--out", "two")
    phalanx(tmp_path, *encode, "--out", "train")
    assert (tmp_path / "two.bin").read_bytes() == (tmp_path / "train.bin").read_bytes()
    assert "import" in phalanx(tmp_path, "data", "inspect", "train", "--tokenizer", "t.model", "--documents", "2")
    words = ["quickstart", "data.tokenizer.path=t.model", "data.train=[{path: train}]"]
    assert json.loads(phalanx(tmp_path, "check", *words, "--json"))["ok"]
    assert "own_packages.py launch.torchrun" in phalanx(tmp_path, "launch", *words, "--dry-run")
    slurm = ["launch.target=slurm", "launch.nodes=2", "cluster.interface=lo"]
    assert "#SBATCH --nodes=2" in phalanx(tmp_path, "launch", *words, *slurm, "--dry-run")
    assert "GiB" in phalanx(tmp_path, "plan", *words)
    assert "parallel.tensor" in json.dumps(json.loads(phalanx(tmp_path, "check", *words, "parallel.tensor=3", "--json", code=2)))


@pytest.mark.parametrize("name", [name for name in shipped_names() if "/" not in name and name != "quickstart"])
def test_other_shipped_runs_are_planned(name: str, tmp_path: Path) -> None:
    phalanx(tmp_path, "check", name, "--no-data")
    assert "GiB" in phalanx(tmp_path, "plan", name)
    assert "parameters" in phalanx(tmp_path, "model", name)


def test_no_run_is_no_error(tmp_path: Path) -> None:
    phalanx(tmp_path, "status")
    phalanx(tmp_path, "completion", "bash")
    phalanx(tmp_path, "logs", "runs/none", code=2)
