"""How long a save stalls training: asynchronous compared with synchronous, with the same state, in one run.

phalanx bench checkpoint [--gib 1.0] [--folder .]

One process saves a state of that size in slices of 16 MiB. A synchronous save returns after the files are written, synced and
completed. An asynchronous save returns after one copy in memory; a thread writes the files. The buffer is allocated before, as
a run does at its start.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint.manifest import FORMAT, Manifest
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.engine.base import WEIGHT, StateSlice
from pretrain.model.tensor_slice import TensorSlice

SLICE = 4 << 20


def make_state(gib: float) -> list[StateSlice]:
    """A state of about `gib` GiB, in slices of SLICE elements."""
    count = max(1, round(gib * 2**30 / 4 / SLICE))
    slice_ = TensorSlice((0,), (SLICE,))
    return [StateSlice(WEIGHT, f"tensor_{i}", (SLICE,), slice_, 0, SLICE, torch.full((SLICE,), float(i))) for i in range(count)]


def manifest(step: int) -> Manifest:
    """A minimal manifest for this step."""
    return Manifest(FORMAT, step, 0, 0, step, None, "megatron", 1, {}, {}, 1, None, None, {}, (WEIGHT,), {}, {}, 1)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="phalanx bench checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--folder", default=".", help="where to write, and delete again")
    args = parser.parse_args(argv)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    state_slices = make_state(args.gib)
    folder = Path(tempfile.mkdtemp(prefix="bench_checkpoint_", dir=args.folder))
    try:
        writers = {"synchronous": CheckpointWriter(folder, 0, False), "asynchronous": CheckpointWriter(folder, 0, True)}
        writers["asynchronous"].reserve(sum(state_slice.data.nbytes for state_slice in state_slices))
        time.sleep(args.gib)
        stalls: dict[str, list[float]] = {name: [] for name in writers}
        for step in range(1, 4):
            for name, writer in writers.items():
                before_s = time.perf_counter()
                writer.start(replace(manifest(step)), state_slices)
                if name == "synchronous":
                    writer.finish()
                stalls[name].append(time.perf_counter() - before_s)
                if name == "asynchronous":
                    before_s = time.perf_counter()
                    _, error = writer.finish()
                    print(f"step {step}: written in the background in {time.perf_counter() - before_s:.2f} s {error or ''}")
                shutil.rmtree(folder)
                folder.mkdir()
        for name, times in stalls.items():
            print(f"{name:<14} stall, s: {', '.join(f'{value:.3f}' for value in times)}")
        print(f"asynchronous / synchronous, last save: {stalls['asynchronous'][-1] / stalls['synchronous'][-1]:.3f}")
    finally:
        shutil.rmtree(folder)
        dist.destroy_process_group()
