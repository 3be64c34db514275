"""Temporary folders: where memory has no room the temporary folder is taken, and a refusal names every place."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ConfigError
from launch.local import scratch
from launch.local.scratch import scratch_folder
from tests.tmpfs import mounted_tmpfs


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A memory file system of our own in the place of /dev/shm."""
    with mounted_tmpfs(tmp_path / "shm", "2m") as memory:
        monkeypatch.setattr(scratch, "_MEMORY", memory)
        (tmp_path / "tmp").mkdir()
        monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
        yield memory


def test_memory_is_taken_while_it_has_room(mounted: Path) -> None:
    with scratch_folder("beats", in_memory=True) as folder:
        assert folder.parent == mounted
    assert list(mounted.iterdir()) == []


def test_a_full_or_read_only_memory_is_passed_over(mounted: Path, tmp_path: Path) -> None:
    (mounted / "filler").write_bytes(b"x" * (3 << 19))
    with scratch_folder("beats", in_memory=True) as folder:
        assert folder.parent == tmp_path / "tmp"
    assert [path.name for path in mounted.iterdir()] == ["filler"], "the attempt in memory left nothing"
    (mounted / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with scratch_folder("beats", in_memory=True) as folder:
        assert folder.parent == tmp_path / "tmp"


def test_without_any_room_every_place_is_named(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mounted / "filler").write_bytes(b"x" * (3 << 19))
    monkeypatch.setenv("TMPDIR", str(mounted / "missing"))
    with pytest.raises(ConfigError) as refused, scratch_folder("beats", in_memory=True):
        pass
    text = str(refused.value)
    assert f"{mounted}: No space left" in text and "missing: No such file" in text and "set TMPDIR" in text
