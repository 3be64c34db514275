"""The questions of a check-up, as a value that every node receives in its command line. In: a config. Out: `CheckupRequest`.

Torch-free.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config

_GPUS = Path(__file__).resolve().parents[2] / "configs" / "gpus.json"
# Names in a check-up's folder.
NODES, NETWORK, NONCE = "nodes", "network.json", "nonce"
NODES_LOG, NETWORK_LOG, HOSTNAMES, FINISHED = "nodes.log", "network.log", "hostnames", "finished"


@dataclass(frozen=True)
class ProbeSizes:
    """Sizes of the measurements, in MiB: `disk_mib` is written and read back on each node; `network_mib` is all-reduced by each
    rank, and () skips the network.
    """

    disk_mib: int = 64
    network_mib: tuple[int, ...] = (1, 16, 64)


@dataclass(frozen=True)
class CheckupRequest:
    """What each node needs to know to check itself.

    `folder` is the absolute path of the check-up's folder inside the run folder. `network_gbit_s` is the share of one rank in
    one direction, or None if unknown. Every node must have the `packages` and must be able to read the `files`.
    """

    folder: str
    nonce: str
    nodes: int
    processes_per_node: int
    device: str
    gpu: str | None
    gpus_per_node: int
    interface: str | None
    network_gbit_s: float | None
    slow_ratio: float
    packages: tuple[str, ...]
    files: tuple[str, ...]
    sizes: ProbeSizes

    @property
    def wants_gpus(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and self.gpu is not None)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> CheckupRequest:
        value: dict[str, Any] = json.loads(text)
        sizes = ProbeSizes(value["sizes"]["disk_mib"], tuple(value["sizes"]["network_mib"]))
        lists = {name: tuple(value[name]) for name in ("packages", "files")}
        return CheckupRequest(**{**value, **lists, "sizes": sizes})


def make_request(
    config: Config, folder: Path, cwd: Path, nodes: int, processes_per_node: int, sizes: ProbeSizes
) -> CheckupRequest:
    """The request for `config`. Relative paths in it start at `cwd`, as they do for the ranks."""
    cluster = config.cluster
    return CheckupRequest(
        folder=str(folder),
        nonce=secrets.token_hex(16),
        nodes=nodes,
        processes_per_node=processes_per_node,
        device=cluster.device,
        gpu=cluster.gpu,
        gpus_per_node=cluster.gpus_per_node,
        interface=cluster.interface,
        network_gbit_s=cluster.network_gbit_s or typical_gbit_s(cluster.gpu),
        slow_ratio=config.launch.watch.straggler_ratio or 1.5,
        packages=needed_packages(config),
        files=tuple(str(cwd / name) for name in needed_files(config)),
        sizes=sizes,
    )


def typical_gbit_s(gpu: str | None) -> float | None:
    """The network that machines with this GPU usually have, in Gbit/s a GPU and direction; None: not in the table."""
    rows: Sequence[Mapping[str, Any]] = json.loads(_GPUS.read_text(encoding="utf-8"))["gpus"]
    return next((row["nic_gbit_s_per_gpu_typical"] for row in rows if row["name"] == gpu), None)


def needed_packages(config: Config) -> tuple[str, ...]:
    """The distributions that a rank of this config needs to start."""
    names = ["torch", "megatron-core"]
    if config.zero.engine == "deepspeed":
        names.append("deepspeed")
    if config.metrics.wandb.mode != "disabled":
        names.append("wandb")
    if config.precision.fp8 != "none":
        names.append("transformer-engine")
    return tuple(names)


def needed_files(config: Config) -> list[str]:
    """The files that the ranks of every node open."""
    parts = [*config.data.train, *config.data.valid]
    files = [part.path + ending for part in parts if part.path for ending in (".bin", ".idx")]
    return files + ([config.data.tokenizer.path] if config.data.tokenizer.path else [])
