"""What pip installs works by itself: the wheel, away from the checkout; and no folder of a user's project gets in its way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from configs import __version__
from configs.own_packages import NAMES

ROOT = Path(__file__).resolve().parents[1]
# A run of seconds.
SMALL = (
    "run.steps=3 run.eval_batches=0 schedule.warmup_steps=1 batch.global_batch_seqs=4 batch.micro_batch_seqs=1 "
    "batch.seq_length_tokens=32 launch.processes_per_node=2 parallel.pipeline=1 parallel.expert=2 metrics.wandb.mode=offline "
    "data.tokenizer.path=t.model 'data.train=[{path: train}]'"
)


def shell(command: str, folder: Path, env: dict[str, str], code: int = 0) -> str:
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def copy_of_the_tree(folder: Path) -> Path:
    """What git tracks and what is new, without build leftovers."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in names:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the sdist, so that it shows what the sdist lacks."""
    folder = tmp_path_factory.mktemp("build")
    tree = copy_of_the_tree(folder / "tree")
    build = "from setuptools import build_meta as b; import sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", build, "build_sdist", str(folder)], cwd=tree, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / f"phalanx-{__version__}"
    subprocess.run([sys.executable, "-c", build, "build_wheel", str(folder)], cwd=unpacked, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(folder), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return folder


def environment(installed: Path, *before: Path) -> dict[str, str]:
    """The installed folder on PYTHONPATH, which comes before the checkout's editable install."""
    path = os.pathsep.join(map(str, (*before, installed)))
    return {**os.environ, "PYTHONPATH": path, "PATH": f"{installed / 'bin'}:{os.environ['PATH']}", "WANDB_MODE": "offline"}


def test_the_wheel_holds_every_file_of_data(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", *NAMES], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    lacking = [name for name in tracked if (ROOT / name).exists() and name not in held]
    assert not lacking
    assert all(f"{name}/py.typed" in held for name in NAMES)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's project that has folders of our names, and of other common ones."""
    folder = tmp_path / "project"
    for name in (*NAMES, "data", "model", "run", "metrics"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('the project has its own {name}')")
    return folder


def test_every_command_works_away_from_the_checkout_among_folders_of_our_names(
    installed: Path, project: Path, tmp_path: Path
) -> None:
    """`tools/` and the others of a user's project: on PYTHONPATH before ours, and in the working folder."""
    where = shell("python -c 'import phalanx_command, tools.cli; print(tools.cli.__file__)'", tmp_path, environment(installed))
    assert where.startswith(str(installed)), "the test must not find the checkout"
    env = environment(installed, project)
    assert shell("phalanx --version", project, env).splitlines()[0].split() == ["phalanx", __version__]
    shell("phalanx data tokenizer --corpus embedded --vocab-size 600 --max-mb 0.3 --out t.model", project, env)
    shell("phalanx data tokenize --corpus embedded --max-mb 0.3 --workers 2 --tokenizer t.model --out train", project, env)
    words = f"quickstart run.dir=runs/mine {SMALL}"
    assert json.loads(shell(f"phalanx check {words} --json", project, env))["ok"]
    shell("phalanx plan qwen3_30b_a3b", project, env)
    shell("phalanx model deepseek_v3", project, env)
    shell(f"phalanx launch {words}", project, env)
    folder = project / "runs" / "mine"
    assert json.loads((folder / "outcome.json").read_text())["step"] == 3
    assert list((folder / "wandb").glob("offline-run-*")), "the copy to W&B started"
    shell("phalanx status runs/mine && phalanx logs runs/mine >/dev/null", project, env)
    shell("phalanx convert export runs/mine hf", project, env)
    assert (project / "hf" / "config.json").exists()
    assert "#SBATCH" in shell("phalanx launch qwen3_30b_a3b --dry-run --no-data", project, env)


@pytest.mark.prove
def test_they_are_not_in_the_way_of_other_processes_either(installed: Path, project: Path) -> None:
    env = environment(installed, project)
    shell("phalanx data tokenizer --corpus embedded --vocab-size 600 --max-mb 0.3 --out t.model", project, env)
    shell("phalanx data tokenize --corpus embedded --max-mb 0.3 --tokenizer t.model --out train", project, env)
    shell("phalanx rehearse quickstart --steps 1 parallel.pipeline=1 launch.processes_per_node=2 parallel.expert=2", project, env)
    shell("phalanx doctor --quick", project, env)
    torchrun = f"{sys.executable} -P -m torch.distributed.run --nproc-per-node 2"
    program = installed / "pretrain" / "main.py"
    shell(f"{torchrun} {program} --config quickstart run.dir=runs/by_hand {SMALL}", project, env)
    assert (project / "runs" / "by_hand" / "DONE").exists()
