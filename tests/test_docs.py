"""README and docs are run: commands in a copy of the tree; links, cited paths and quoted errors lead somewhere."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_config
from parallel.legality.verdict import check_config
from tools.ladder.ladder_file import read_ladder
from tools.reference import GENERATORS, MARKER

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]
FOLDERS = ("configs", "parallel", "pretrain", "launch", "tools")
# Run by other tests, at a length that shows something.
ELSEWHERE = ("make test",)


def commands() -> list[str]:
    """Every line of the blocks marked sh, each once, the README's first."""
    blocks = [block for page in PAGES.values() for block in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [line for line in dict.fromkeys(lines) if line not in ELSEWHERE]


# Where a file says how much is done -> what is put there: 6 steps of a quarter of the batch, a fifth of the text.
SHORTER = {
    "configs/run/quickstart.yaml": {
        "  steps: 240\n": "  steps: 6\n",
        "  global_batch_seqs: 32\n": "  global_batch_seqs: 8\n",
        "  warmup_steps: 20\n": "  warmup_steps: 2\n",
    },
    "Makefile": {"--max-mb 6": "--max-mb 2", "tokenize --corpus embedded": "tokenize --corpus embedded --max-mb 2"},
}


def shorten(tree: Path) -> None:
    for name, changes in SHORTER.items():
        text = (tree / name).read_text()
        for words, fewer in changes.items():
            assert text.count(words) == 1, words
            text = text.replace(words, fewer)
        (tree / name).write_text(text)


COMMAND = """#!{python}
import runpy

runpy.run_path("{tree}/configs/own_packages.py")
from tools.cli import main

if __name__ == "__main__":
    main()
"""


@pytest.mark.timeout(900)
def test_every_command_works(tmp_path: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    # The console script of the environment would take the checkout's packages: here is the copy's.
    script = tmp_path / "bin" / "phalanx"
    script.parent.mkdir()
    script.write_text(COMMAND.format(python=sys.executable, tree=tmp_path))
    script.chmod(0o755)
    path = f"{script.parent}:{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "WANDB_MODE": "offline"}
    run = commands()
    assert run[0] == "make demo", "the first thing that a newcomer types"
    # The environment is here already, and a few short steps show that the demo runs.
    run[0] = "make -o .venv/installed BIN=bin demo"
    shorten(tmp_path)
    for command in run:
        result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    for name, step in (("quickstart", 6), ("first", 10), ("by_hand", 8)):
        outcome = json.loads((tmp_path / "runs" / name / "outcome.json").read_text())
        assert (outcome["state"], outcome["step"]) == ("finished", step)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_parts(name: str) -> None:
    """Each is made, has a place on a page, and every row of its tables has as many cells as the row before."""
    assert sum(f"<!-- generate: {name} -->" in page for page in PAGES.values()) == 1
    rows = [re.sub(r"\\\|", "", line) for line in GENERATORS[name]().splitlines()]
    widths = [
        (one.count("|"), two.count("|")) for one, two in itertools.pairwise(rows) if one.startswith("|") and two.startswith("|")
    ]
    assert widths and all(one == two for one, two in widths)


def test_markers_name_a_generator() -> None:
    names = {name for page in PAGES.values() for name in MARKER.findall(page)}
    assert names == set(GENERATORS)


def anchors(page: str) -> set[str]:
    return {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_have_targets(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[path]):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_cited_paths_exist(path: Path) -> None:
    cited = re.findall(rf"`((?:{'|'.join(FOLDERS)}|tests|docs)/[\w/.-]*)`", PAGES[path])
    assert not [name for name in cited if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_yaml_examples_are_configs(path: Path, tmp_path: Path) -> None:
    for number, example in enumerate(re.findall(r"^```yaml\n(.*?)^```", PAGES[path], re.MULTILINE | re.DOTALL)):
        (tmp_path / f"example_{number}.yaml").write_text(example)
        if example.startswith("ladder:"):
            assert read_ladder(str(tmp_path / f"example_{number}.yaml")).points
            continue
        config = load_config(str(tmp_path / f"example_{number}.yaml")).config
        assert not check_config(config).problems
