"""What an unfinished save takes is free again at the next start, so it counts as free."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.write import remove_leftovers
from pretrain.preflight.disk_space import reclaimed_bytes
from pretrain.run.folder import RunFolder, unfinished_folders


def test_what_the_next_start_deletes_counts_as_free(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("step_0000002", "step_0000004", "step_0000004.replaced", "step_0000006.partial", "step_0000008.replaced"):
        (folder.checkpoints / name / "weights").mkdir(parents=True)
        (folder.checkpoints / name / "weights" / "0.bin").write_bytes(b"x" * (1 << 16))
    assert [path.name for path in unfinished_folders(folder.checkpoints)] == ["step_0000004.replaced", "step_0000006.partial"]
    assert reclaimed_bytes(folder) >= 2 << 16
    remove_leftovers(folder.checkpoints)
    left = sorted(path.name for path in folder.checkpoints.iterdir())
    assert left == ["step_0000002", "step_0000004", "step_0000008"], "a checkpoint without its replacement is put back"
    assert reclaimed_bytes(folder) == 0
    assert reclaimed_bytes(RunFolder(tmp_path / "nothing")) == 0
