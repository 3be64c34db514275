"""The private cluster, once a test session. Without root or the packages these tests are skipped; CI makes that a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.run.conftest import run_config, undisturbed
from tests.run.world import launch
from tests.slurm.cluster import Cluster, missing, started
from tests.slurm.world import WORDS

__all__ = ["run_config", "undisturbed"]


@pytest.fixture(scope="session")
def powered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        if os.environ.get("PHALANX_REQUIRE_SLURM"):
            pytest.fail(why)
        pytest.skip(why)
    with started(Cluster(tmp_path_factory.mktemp("slurm"))) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def quiet(run_config: Path, powered: Cluster) -> Path:
    """The same run on this machine, by torchrun, undisturbed."""
    run_dir = run_config.parent / "quiet"
    command = launch(run_config, run_dir, *WORDS)
    assert command.end() == 0, command.errors
    return run_dir


@pytest.fixture
def cluster(powered: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("SLURM_CONF", powered.env["SLURM_CONF"])
    yield powered
    powered.restore()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch takes the working folder along."""
    monkeypatch.chdir(tmp_path)
