"""Writing a checkpoint. Every rank writes its own slices in a thread while training continues, and rank 0 completes the save.

start: each rank copies the slices that it owns into host memory, and a thread writes the copy. Training waits for the copy only.
finish: all ranks call it at the same step when their threads are done. Rank 0 gathers checksums and sizes, writes the index and
the manifest, then the marker, and renames the folder. A crash before that leaves a .partial folder. No reader takes it for a
checkpoint, and the next save of that step replaces it.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pretrain.checkpoint.manifest import Manifest, slice_key
from pretrain.checkpoint.tensor_file import Written, write_tensor_file
from pretrain.engine.base import StateSlice
from pretrain.run.files import sync_folder, write_atomically
from pretrain.run.folder import COMPLETE, complete_checkpoints, step_folder, unfinished_folders

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.float64: "F64"}

PENDING, DONE, FAILED = 1, 0, 2

# One rank's part of a save: (what it wrote, None), or (None, why it failed).
Part = tuple[Written | None, str | None]


@dataclass
class _Save:
    manifest: Manifest
    partial: Path
    thread: threading.Thread | None = None
    written: Written | None = None
    error: Exception | None = None


class CheckpointWriter:
    """The saves of one attempt, of which at most one is under way. `start` and `finish` are collective."""

    def __init__(self, checkpoints: Path, rank: int, asynchronous: bool) -> None:
        self.checkpoints = checkpoints
        self.rank = rank
        self.asynchronous = asynchronous
        self._buffer: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._touch: threading.Thread | None = None
        self._save: _Save | None = None

    @property
    def status(self) -> int | None:
        """The state of this rank's part of the save: PENDING, DONE or FAILED. None: no save is under way."""
        save = self._save
        if save is None:
            return None
        if save.thread is not None and save.thread.is_alive():
            return PENDING
        return FAILED if save.error else DONE

    def reserve(self, num_bytes: int) -> None:
        """Allocate the buffer of later asynchronous saves and touch its pages in a thread: that takes longer than the copy."""
        if self.asynchronous and num_bytes > self._buffer.nbytes:
            self._buffer = np.empty(num_bytes, dtype=np.uint8)
            self._touch = threading.Thread(target=self._buffer.fill, args=(0,), name="reserve", daemon=True)
            self._touch.start()

    def start(self, manifest: Manifest, state_slices: Sequence[StateSlice], refusal: str | None = None) -> None:
        """Begin a save. No other save may be under way. With asynchronous=False the files are written when this returns.

        `refusal`: why rank 0 can't save now. The save then fails on all ranks, and nothing is written.
        """
        assert self._save is None, "finish the save before"
        partial = step_folder(self.checkpoints, manifest.step).with_suffix(".partial")
        save = _Save(manifest, partial)
        error = OSError(refusal) if refusal else None
        if self.rank == 0 and error is None:
            try:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir(parents=True)
            except OSError as raised:
                error = raised
        # No rank writes before the folder exists.
        made = torch.tensor([0 if error is None else 1])
        dist.broadcast(made, src=0)
        self._save = save
        if made.item():
            # Rank 0 alone names the reason.
            save.error = error
            return
        heads = [
            (_key(state_slice), DTYPE_NAMES[state_slice.data.dtype], (state_slice.stop - state_slice.start,))
            for state_slice in state_slices
        ]
        path = partial / f"rank_{self.rank:05d}.safetensors"
        if not heads:
            save.written = Written(0, {})
        elif self.asynchronous:
            values = self._snapshot(state_slices)
            save.thread = threading.Thread(target=self._write, args=(save, path, heads, values), name="checkpoint", daemon=True)
            save.thread.start()
        else:
            self._write(save, path, heads, (_bytes(state_slice.data) for state_slice in state_slices))

    def _snapshot(self, state_slices: Sequence[StateSlice]) -> list[NDArray[np.uint8]]:
        """Copies of the slices' bytes, in one host buffer that all saves use."""
        sizes = [state_slice.data.numel() * state_slice.data.element_size() for state_slice in state_slices]
        self.reserve(sum(sizes))
        if self._touch is not None:
            self._touch.join()
        copies, position = [], 0
        for state_slice, size in zip(state_slices, sizes, strict=True):
            target = self._buffer[position : position + size]
            torch.from_numpy(target).copy_(state_slice.data.detach().view(torch.uint8), non_blocking=True)
            copies.append(target)
            position += size
        if state_slices and state_slices[0].data.is_cuda:
            torch.cuda.synchronize()
        return copies

    def _write(
        self, save: _Save, path: Path, heads: list[tuple[str, str, tuple[int, ...]]], values: Iterable[NDArray[np.uint8]]
    ) -> None:
        try:
            save.written = write_tensor_file(path, heads, values)
        except OSError as error:
            save.error = error

    def wait(self) -> None:
        """Wait until this rank's part is written or has failed."""
        if self._save and self._save.thread:
            self._save.thread.join()

    def finish(self) -> tuple[Path, str | None]:
        """Complete the save on all ranks. Returns (its folder, None) or (its folder, why it failed).

        A failed save leaves no files.
        """
        save = self._save
        assert save is not None, "no save is under way"
        self.wait()
        self._save = None
        mine = (save.written, str(save.error) if save.error else None)
        gathered: list[Part] = [(None, None)] * (dist.get_world_size() if self.rank == 0 else 0)
        dist.gather_object(mine, gathered or None, dst=0)
        result: list[str | None] = [self._complete(save, gathered) if self.rank == 0 else None]
        dist.broadcast_object_list(result, src=0)
        return save.partial.with_suffix(""), result[0]

    def _complete(self, save: _Save, gathered: list[Part]) -> str | None:
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(gathered) if error]
        if not errors:
            try:
                self._publish(save, {f"rank_{rank:05d}.safetensors": part for rank, (part, _) in enumerate(gathered) if part})
                return None
            except OSError as error:
                errors = [f"rank 0: {error}"]
        shutil.rmtree(save.partial, ignore_errors=True)
        return "; ".join(errors[:3])

    def _publish(self, save: _Save, parts: dict[str, Written]) -> None:
        parts = {name: part for name, part in parts.items() if part.sums}
        index = {name: part.sums for name, part in parts.items()}
        manifest = replace(save.manifest, files={name: part.num_bytes for name, part in parts.items()})
        write_atomically(save.partial / "index.json", json.dumps(index))
        write_atomically(save.partial / "manifest.json", manifest.as_json())
        write_atomically(save.partial / COMPLETE, "")
        sync_folder(save.partial)
        final = save.partial.with_suffix("")
        replaced = final.with_suffix(".replaced")
        if final.exists():
            # The same step saved again after a return to an older checkpoint.
            final.rename(replaced)
        try:
            save.partial.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        sync_folder(self.checkpoints)
        # The checkpoint is complete. What can't be deleted now is deleted by the next attempt.
        shutil.rmtree(replaced, ignore_errors=True)


def _key(state_slice: StateSlice) -> str:
    return slice_key(state_slice.kind, state_slice.name, state_slice.tensor_slice, state_slice.start, state_slice.stop)


def _bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return tensor.detach().cpu().view(torch.uint8).numpy()


def prune(checkpoints: Path, keep: int, milestone_interval: int | None) -> Iterator[Path]:
    """Delete complete checkpoints except the newest `keep` and milestones. Yields each deleted folder. Rank 0 only.

    `keep` 0: delete none. `milestone_interval`: a checkpoint at a multiple of so many steps is a milestone. Raises OSError.
    """
    for step, folder in complete_checkpoints(checkpoints)[keep:] if keep else []:
        if milestone_interval and step % milestone_interval == 0:
            continue
        # A folder that is half deleted must not look like a checkpoint.
        doomed = folder.with_suffix(".partial")
        folder.rename(doomed)
        shutil.rmtree(doomed)
        yield folder


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what a crash left of unfinished saves and deletions, and put back a checkpoint whose replacement did not come.

    Rank 0 calls it before the first save of an attempt. Raises OSError.
    """
    for folder in unfinished_folders(checkpoints):
        shutil.rmtree(folder)
    for folder in checkpoints.glob("step_*.replaced"):
        folder.rename(folder.with_suffix(""))
