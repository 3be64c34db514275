"""Memory, compute and network speed of GPUs. In: a GPU's name, the `cluster` section. Out: `Gpu` and `PlannedMachine`.

Units: dense TFLOP/s; GB is 1e9 bytes; bandwidths are per GPU and in one direction. configs/gpus.json names the sources.

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
# For GPUs without a published figure: the median of the published ones, as a share of the dense peak.
LARGEST_GEMM_BF16, LARGEST_GEMM_FP8 = 0.78, 0.735
TYPICAL_NIC_GBIT_S = 200.0
# H100's: 3.7e12 exponentials a second beside 989 TFLOP/s.
EXPONENTIALS_PER_TFLOP = 3.7 / 989
PCIE_GB_S = 25.0
# The "GB" of GPU memory that makers state are GiB. The driver keeps about 1%: nvidia-smi shows 79.6 GiB of an H100's 80 and
# 140.4 of an H200's 141.
USABLE_MEMORY = 0.99
# One CPU core: speed of matrix products in TFLOP/s, of memory in GB/s.
HOST_NAME, HOST_TFLOPS, HOST_GB_S = "a CPU process", 0.1, 8.0
# Usual short names in lower case, and the names in the table.
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
    """One GPU of the table. `gemm_bf16`, `gemm_fp8`: share of the peak that its largest measured matrix product reaches.

    `power_share`: its power limit over the largest one that its chip is sold with. `exponentials_s`: exponentials a second.
    """

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
    power_share: float = 1.0
    exponentials_s: float = 1e12

    @property
    def has_fp8(self) -> bool:
        """True when fp8 products are faster than bf16 ones: NVIDIA Hopper and later, AMD MI300 and later."""
        return self.fp8_tflops > self.bf16_tflops

    @property
    def memory_gib(self) -> float:
        return USABLE_MEMORY * self.memory_gb

    def peak_tflops(self, compute: str) -> float:
        """Dense peak of a number format, TFLOP/s. A format that the GPU lacks runs in the next wider one."""
        return {"fp32": self.bf16_tflops / 2, "bf16": self.bf16_tflops, "fp8": self.fp8_tflops, "fp4": self.fp4_tflops}[compute]

    def largest_gemm(self, compute: str) -> float:
        """Share of that peak that the largest matrix products reach."""
        return self.gemm_fp8 if compute in ("fp8", "fp4") else self.gemm_bf16

    @property
    def clock(self) -> float:
        """Clock under sustained products over that at the chip's full power: power grows as the clock's third power, as voltage
        rises with it."""
        return self.power_share ** (1 / 3)


@dataclass(frozen=True)
class PlannedMachine:
    """GPUs and their networks: `domain` GPUs share a scale-up network (NVLink); between domains each GPU has its own NIC."""

    gpu: Gpu
    domain: int
    nic_gb_s: float
    price_per_gpu_hour_usd: float | None = None

    def bandwidth_gb_s(self, span: int) -> float:
        """Bandwidth between ranks of one group whose members lie within `span` neighbouring ranks, GB/s."""
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
        power_share=float(row["power_share"]),
        exponentials_s=1e12 * float(row["exponentials_tera_s"] or EXPONENTIALS_PER_TFLOP * bf16),
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
    """The GPU that free text names: "NVIDIA H100 SXM5 80GB", "A100-SXM4-40GB", "8x GB200 NVL72". None when none is known.

    The chip's name decides; "PCIe" and the memory size choose among its cards.
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
    """A process of a machine without GPUs, described as a slow GPU: its share of host memory, a few GB/s through gloo."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share_gb = pages / GIB / config.launch.processes_per_node / USABLE_MEMORY
    return Gpu(HOST_NAME, HOST_TFLOPS, HOST_TFLOPS, HOST_TFLOPS, share_gb, HOST_GB_S, HOST_GB_S / 4, 8, 10.0, 0.5, 0.5)


def make_machine(config: Config) -> PlannedMachine:
    """The machine of the `cluster` section. Raises ConfigError when its GPU isn't in the table."""
    cluster = config.cluster
    gpu = find_gpu(cluster.gpu) if cluster.gpu else host(config)
    if gpu is None:
        names = [*gpus(), *ALIASES]
        close = difflib.get_close_matches(cluster.gpu or "", names, n=3, cutoff=0.3)
        fix = f"set cluster.gpu={close[0]!r}" if close else "set cluster.gpu=H100-SXM-80GB"
        rule = "must be a GPU of the planner's table (configs/gpus.json)" + (f"; nearest: {', '.join(close)}" if close else "")
        raise ConfigError(Problem("cluster.gpu", cluster.gpu, rule, fix))
    nic_gbit_s = cluster.network_gbit_s or gpu.nic_gbit_s
    domain = cluster.scaleup_gpus or (gpu.scaleup_gpus if gpu.scaleup_gpus > 8 else cluster.gpus_per_node)
    return PlannedMachine(gpu, domain, nic_gbit_s / 8, cluster.price_per_gpu_hour_usd)
