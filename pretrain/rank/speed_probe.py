"""A small fixed computation that is timed at intervals. In: the device. Out: its duration in seconds, in the rank's heartbeat.

Collectives make the steps of all ranks as long as those of the slowest rank. Step times therefore don't tell which rank has a
throttled GPU or a node that other programs use. The duration of the same matrix product on every rank does. The probe costs
about 1 ms every `interval_steps`. It draws no random numbers and uses no tensor of the model.
"""

from __future__ import annotations

import time

import torch

from pretrain.run.heartbeat import Heartbeat

# (width of the square matrices, number of products). Each takes about 1 ms, on one CPU thread and on a current GPU.
_CPU_WORK = (256, 1)
_GPU_WORK = (2048, 32)


class SpeedProbe:
    """Probes every `interval_steps` steps; None: never.

    The first probe allocates two matrices, of 256 KiB each on a CPU and 8 MiB each on a GPU.
    """

    def __init__(self, interval_steps: int | None, device: torch.device, beat: Heartbeat) -> None:
        self._interval_steps = interval_steps
        self._device = device
        self._beat = beat
        self._matrices: tuple[torch.Tensor, torch.Tensor] | None = None

    def after(self, step: int) -> None:
        """Call it after step number `step`, counted from 1, when the device has no work left."""
        if self._interval_steps is None or step % self._interval_steps:
            return
        self._beat.probed(self.measure_s())

    def measure_s(self) -> float:
        """The duration of one probe in seconds. The first call also allocates the matrices and warms up."""
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
