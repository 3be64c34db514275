"""A small fixed computation that is timed at intervals. In: the device. Out: its duration in seconds, in the rank's heartbeat.

Collectives make every rank's step as long as the slowest's, so step times don't tell who is slow: a throttled GPU, a node
that something else uses. The same product on every rank does. It costs about 1 ms every `interval_steps`, takes no random
numbers and touches nothing of the model.
"""

from __future__ import annotations

import time

import torch

from pretrain.run.heartbeat import Heartbeat

# (width of the square matrices, products): about 1 ms on one CPU thread, and on a current GPU.
_CPU_WORK = (256, 1)
_GPU_WORK = (2048, 32)


class SpeedProbe:
    """`interval_steps` None: never. The matrices (2 of 256 KiB, on a GPU of 8 MiB) are made at the first probe."""

    def __init__(self, interval_steps: int | None, device: torch.device, beat: Heartbeat) -> None:
        self._interval_steps = interval_steps
        self._device = device
        self._beat = beat
        self._matrices: tuple[torch.Tensor, torch.Tensor] | None = None

    def after(self, step: int) -> None:
        """Called after step number `step` (from 1), when the device has nothing left to do."""
        if self._interval_steps is None or step % self._interval_steps:
            return
        self._beat.probed(self.measure_s())

    def measure_s(self) -> float:
        """Seconds of one probe; the first call makes the matrices and warms up."""
        is_cuda = self._device.type == "cuda"
        width, products = _GPU_WORK if is_cuda else _CPU_WORK
        if self._matrices is None:
            kind = torch.bfloat16 if is_cuda else torch.float32
            ones = torch.ones(width, width, dtype=kind, device=self._device)
            self._matrices = (ones, torch.empty_like(ones))
            self.measure_s()
        factor, result = self._matrices
        if is_cuda:
            torch.cuda.synchronize(self._device)
        started_s = time.perf_counter()
        with torch.no_grad():
            for _ in range(products):
                torch.mm(factor, factor, out=result)
        if is_cuda:
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started_s
