"""One undisturbed run, which others must equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run.world import launch, write_config


@pytest.fixture(scope="session")
def run_config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("run") / "small.yaml", folder)


@pytest.fixture(scope="session")
def undisturbed(run_config: Path) -> Path:
    command = launch(run_config, run_config.parent / "undisturbed")
    assert command.end() == 0, command.errors
    (run_config.parent / "undisturbed.txt").write_text(command.output)
    return run_config.parent / "undisturbed"
