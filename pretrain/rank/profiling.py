"""torch's profiler over a window of steps, and a CUDA memory snapshot. In: metrics.profile. Out: files in RUN_DIR/profile."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from configs.metrics_schema import Profile
from parallel.compat.torch_private import dump_cuda_memory, record_cuda_memory


class ProfileWindow:
    """Profiles the steps [start_step, start_step + num_steps) on the chosen ranks. Without a start_step it does nothing."""

    def __init__(self, section: Profile, folder: Path, rank: int) -> None:
        self.section = section
        self.folder = folder
        self.rank = rank
        self._profiler: profile | None = None
        self._wanted = section.start_step is not None and rank in section.ranks

    def before(self, step: int) -> None:
        """Call it before step number `step`, counted from 1. Starts the profiler at the first step of the window."""
        if self._profiler is not None:
            return  # a rollback returned to a step inside the window
        if self._wanted and step == self.section.start_step:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            if self.section.memory_snapshot and torch.cuda.is_available():
                record_cuda_memory()
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Call it after step number `step`. Writes the trace after the last step of the window."""
        if self._profiler is None or step < (self.section.start_step or 0) + self.section.num_steps - 1:
            return
        self._profiler.stop()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.folder / f"rank_{self.rank}.trace.json"))
            if self.section.memory_snapshot and torch.cuda.is_available():
                dump_cuda_memory(self.folder / f"rank_{self.rank}.memory.pickle")
        except (OSError, RuntimeError) as error:
            print(f"phalanx: the profile of rank {self.rank} is not written: {error}", file=sys.stderr, flush=True)
        self._profiler = None
