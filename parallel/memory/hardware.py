"""What a GPU and its networks can do. In: a GPU's name, the `cluster` section. Out: `Gpu` and `Machine`.

Units: TFLOP/s dense, GB = 1e9 bytes, bandwidths per GPU and one direction. Sources stand in configs/gpus.json.

Torch-free.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.schema import Config

TABLE = Path(__file__).resolve().parents[2] / "configs" / "gpus.json"
GIB = 2**30
# Where a GPU's own figure isn't published: the middle of those that are.
LARGEST_GEMM_BF16, LARGEST_GEMM_FP8 = 0.78, 0.735
TYPICAL_NIC_GBIT_S = 200.0
PCIE_GB_S = 25.0
# Makers' GB of GPU memory are GiB; the driver keeps about 1% (nvidia-smi: 79.6 GiB of an H100's 80, 140.4 of an H200's 141).
USABLE_MEMORY = 0.99
# One core: products in TFLOP/s, memory in GB/s.
HOST_NAME, HOST_TFLOPS, HOST_GB_S = "a CPU process", 0.1, 8.0
# What people write, lower case, for names of the table.
ALIASES = {
    "a100": "A100-SXM-80GB", "a100-80gb": "A100-SXM-80GB", "a100-40gb": "A100-SXM-40GB", "a800": "A800-SXM-80GB",
    "h100": "H100-SXM-80GB", "h100-80gb": "H100-SXM-80GB", "h800": "H800-SXM-80GB", "h200": "H200-SXM-141GB",
    "h200-141gb": "H200-SXM-141GB", "gh200": "GH200-96GB", "h20": "H20-96GB", "b200": "B200-SXM-180GB",
    "b200-180gb": "B200-SXM-180GB", "gb200": "GB200-NVL72", "b300": "B300-SXM-288GB", "gb300": "GB300-NVL72",
    "l40s": "L40S-48GB", "mi300x": "MI300X-192GB", "mi325x": "MI325X-256GB", "mi355x": "MI355X-288GB",
    "mi250x": "MI250X (per GCD)",
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """One GPU of the table. `gemm_*`: part of the peak that its largest measured product reaches."""

    name: str
    bf16_tflops: float
    fp8_tflops: float
    fp4_tflops: float
    memory_gb: float
    memory_gb_s: float
    scaleup_gb_s: float
    scaleup_gpus: int
    nic_gbit_s: float
    gemm_bf16: float
    gemm_fp8: float

    @property
    def has_fp8(self) -> bool:
        """NVIDIA's Hopper and later, and their like."""
        return self.fp8_tflops > self.bf16_tflops

    @property
    def memory_gib(self) -> float:
        return USABLE_MEMORY * self.memory_gb

    def peak_tflops(self, compute: str) -> float:
        """Dense peak of a number format; one that the GPU doesn't have runs in the next wider one."""
        return {"fp32": self.bf16_tflops / 2, "bf16": self.bf16_tflops, "fp8": self.fp8_tflops, "fp4": self.fp4_tflops}[compute]

    def largest_gemm(self, compute: str) -> float:
        """Fraction of that peak which the largest products reach."""
        return self.gemm_fp8 if compute in ("fp8", "fp4") else self.gemm_bf16


@dataclass(frozen=True)
class Machine:
    """GPUs as they are joined: `domain` GPUs share the scale-up network, beyond it each has its NIC."""

    gpu: Gpu
    domain: int
    nic_gb_s: float
    price_per_gpu_hour_usd: float | None = None

    def bandwidth_gb_s(self, span: int) -> float:
        """Between ranks of one group whose members lie within `span` neighbouring ranks."""
        return self.gpu.scaleup_gb_s if span <= self.domain else self.nic_gb_s


def _gpu(row: dict[str, Any]) -> Gpu:
    bf16 = float(row["peak_dense_bf16_tflops"])
    fp8 = float(row["peak_dense_fp8_tflops"] or bf16)
    return Gpu(
        name=row["name"],
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        fp4_tflops=float(row["peak_dense_fp4_tflops"] or fp8),
        memory_gb=float(row["memory_gb"]),
        memory_gb_s=1000 * float(row["memory_bandwidth_tb_s"]),
        scaleup_gb_s=float(row["scaleup_bw_gb_s_unidirectional"] or PCIE_GB_S),
        scaleup_gpus=int(row["scaleup_domain_gpus"]),
        nic_gbit_s=float(row["nic_gbit_s_per_gpu_typical"] or TYPICAL_NIC_GBIT_S),
        gemm_bf16=float(row["largest_gemm_bf16_fraction"] or LARGEST_GEMM_BF16),
        gemm_fp8=float(row["largest_gemm_fp8_fraction"] or LARGEST_GEMM_FP8),
    )


@cache
def gpus() -> dict[str, Gpu]:
    """Every GPU of the table by name."""
    return {row["name"]: _gpu(row) for row in json.loads(TABLE.read_text(encoding="utf-8"))["gpus"]}


def find_gpu(name: str) -> Gpu | None:
    """The GPU of this name or alias, or None."""
    table = gpus()
    if name in table:
        return table[name]
    alias = ALIASES.get(name.strip().lower())
    return table[alias] if alias else None


def guess_gpu(text: str) -> Gpu | None:
    """The GPU that someone's words mean: "NVIDIA H100 SXM5 80GB", "A100-SXM4-40GB", "8x GB200 NVL72". None when it isn't known.

    The chip decides; PCIe and the memory choose among its cards.
    """
    if exact := find_gpu(text.split(" (")[0].split(",")[0].split("/")[0]):
        return exact
    words = re.split(r"[^a-z0-9]+", text.lower())
    chip = next((word for word in words if word in ALIASES), None)
    if chip is None:
        return None
    usual = gpus()[ALIASES[chip]]
    cards = [gpu for gpu in gpus().values() if gpu.name.lower().split("-")[0] == chip and "meta" not in gpu.name.lower()]
    cards = [gpu for gpu in cards if ("pcie" in gpu.name.lower()) == ("pcie" in words)]
    size = re.search(r"(\d+)\s?gi?b(?:\b|_)", text.lower())
    sized = [gpu for gpu in cards if size and gpu.memory_gb == float(size[1])]
    if "pcie" in words:
        return (sized or cards or [None])[0]
    return sized[0] if sized and usual not in sized else usual


def host(config: Config) -> Gpu:
    """A process of a machine without GPUs, as a slow GPU: its share of the memory, a few GB/s through gloo."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share_gb = pages / GIB / config.launch.processes_per_node / USABLE_MEMORY
    return Gpu(HOST_NAME, HOST_TFLOPS, HOST_TFLOPS, HOST_TFLOPS, share_gb, HOST_GB_S, HOST_GB_S / 4, 8, 10.0, 0.5, 0.5)


def make_machine(config: Config) -> Machine:
    """The machine of the `cluster` section. Raises ConfigError when its GPU isn't in the table."""
    cluster = config.cluster
    gpu = find_gpu(cluster.gpu) if cluster.gpu else host(config)
    if gpu is None:
        names = [*gpus(), *ALIASES]
        close = difflib.get_close_matches(cluster.gpu or "", names, n=3, cutoff=0.3)
        fix = f"set cluster.gpu={close[0]!r}" if close else "set cluster.gpu=H100-SXM-80GB"
        rule = "the planner needs a GPU of its table (configs/gpus.json)" + (f"; nearest: {', '.join(close)}" if close else "")
        raise ConfigError(Problem("cluster.gpu", cluster.gpu, rule, fix))
    nic_gbit_s = cluster.network_gbit_s or gpu.nic_gbit_s
    domain = cluster.scaleup_gpus or (gpu.scaleup_gpus if gpu.scaleup_gpus > 8 else cluster.gpus_per_node)
    return Machine(gpu, domain, nic_gbit_s / 8, cluster.price_per_gpu_hour_usd)
