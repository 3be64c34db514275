"""What all tests share: one thread of torch, one small tokenised corpus made by the real commands' functions."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from pretrain.run.process import importing

with importing():
    from tests.corpus import make_corpus

    # Without torch (make prove-python313) only tests that need none are run.
    if find_spec("torch"):
        from tests import keep_groups

        keep_groups.install()
# A shell's background and nohup have tests ignore these, and so would the commands that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# What takes longest goes first, so that the processes end together. The files of a folder here share a run or a cluster.
FIRST = ("tests/slurm/", "tests/test_docs.py", "tests/run/", "tests/reference/", "tests/launch/local/", "tests/tools/rehearse/")


def first_part(nodeid: str) -> str:
    """The part of FIRST that a test belongs to; empty: none."""
    return next((part for part in FIRST if nodeid.startswith(part)), "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {part: rank for rank, part in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(first_part(item.nodeid), len(FIRST)))


class ByFile(LoadScopeScheduling):
    """A file at a time for each test process, a folder of FIRST as a whole."""

    def _split_scope(self, nodeid: str) -> str:
        return first_part(nodeid) or nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Where the test files import torch, two engines and transformers."""
    with importing():
        return (yield)


@pytest.fixture(scope="module")
def deepspeed_imported() -> None:
    """Forked ranks find DeepSpeed imported (3 s)."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import pretrain.engine.deepspeed  # noqa: F401, PLC0415  (after the line above)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that an ordinary user reaches. pytest's own are root's alone, and each pytest that starts shuts them again."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    make_corpus(made)
    return made
