"""What a launch runs. In: a checked config and its name on the command line. Out: a `LaunchPlan` and the shell line.

This module starts nothing and writes nothing, so a dry run shows exactly what a launch would run.

Torch-free.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs import own_packages
from configs.errors import Problem
from configs.schema import Config
from launch.watch.heartbeats import WatchPolicy, make_watch_policy
from parallel.environment import check_environment
from pretrain.run.folder import RunFolder, folder_of

# Defaults for every rank's environment: variable → (value, reason). The user's environment and launch.env win over them.
ENV_DEFAULTS: dict[str, tuple[str, str]] = {
    "OMP_NUM_THREADS": ("1", "ranks share the cores, and the order of a sum must not depend on how many there are"),
    "CUDA_DEVICE_MAX_CONNECTIONS": ("1", "tensor parallel overlap needs kernels to start in the order they were queued"),
    "PYTHONFAULTHANDLER": ("1", "a crash in C code leaves the Python stack in the rank's log"),
    "TOKENIZERS_PARALLELISM": ("false", "threads of a tokenizer don't survive the data loader's fork"),
}
# These replace the defaults above if parallel.overlap_expert_comm is true.
EXPERT_OVERLAP_ENV: dict[str, tuple[str, str]] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": ("32", "tokens travel on a stream of their own: one queue would hold them up behind products"),
}
# Set for runs on GPUs if the user has set neither name of it. torch 2.6 to 2.8 know this name alone, and 2.9 takes expandable
# segments from no other (pytorch issue 183387); later ones read both. Tensors can't be shared by cudaIpcGetMemHandle then, and
# CUDA graphs of collectives need NCCL_GRAPH_REGISTER=0: the engines here do neither.
ALLOCATOR_ENV, ALLOCATOR_ALIAS = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
ALLOCATOR_DEFAULT = ("expandable_segments:True", "blocks of memory grow in place, and leave fewer gaps that no tensor fits into")
# The variables that are set to cluster.interface. A node has several networks, and the first one is often slow.
INTERFACE_ENV: dict[str, str] = {
    "GLOO_SOCKET_IFNAME": "the interface of gloo: control messages, and everything on CPU",
    "NCCL_SOCKET_IFNAME": "the interface of NCCL's first contact; the data go over InfiniBand or RoCE where there is any",
}
# The ranks of a single machine meet on loopback, which depends on no name service, firewall or external network.
LOOPBACK = "127.0.0.1"
LOOPBACK_ENV = {"GLOO_SOCKET_IFNAME": "lo"}
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class LaunchPlan:
    """One torchrun agent: `processes_per_node` ranks of `program` with `arguments`, on each of `nodes` machines."""

    folder: RunFolder
    program: str
    arguments: tuple[str, ...]
    nodes: int
    processes_per_node: int
    rendezvous: str
    name: str
    env: tuple[tuple[str, str], ...]
    watch: WatchPolicy
    shared_imports: bool = True
    python: str = sys.executable

    @property
    def argv(self) -> list[str]:
        """The agent's command. torchrun restarts no ranks, because a restart is a new attempt of the launcher or of Slurm."""
        local = ["--local-addr", LOOPBACK] if self.nodes == 1 else []
        return [
            *own_packages.command(self.python, "launch.torchrun"),
            *("--nnodes", str(self.nodes), "--nproc-per-node", str(self.processes_per_node)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", self.rendezvous, "--rdzv-id", self.name),
            *local,
            *("--max-restarts", "0", *start_words(self.shared_imports), self.program),
            *self.arguments,
        ]


def start_words(shared_imports: bool) -> tuple[str, ...]:
    """torchrun's options for the ranks' start: functions in forked processes, or else nothing: each is a Python of its own."""
    return ("--run-path", "--start-method", "forkserver") if shared_imports else ()


def rank_env(config: Config) -> list[tuple[str, str, str]]:
    """The environment of the ranks of a run on several machines, as tuples (variable, default, reason)."""
    chosen = ENV_DEFAULTS | (EXPERT_OVERLAP_ENV if config.parallel.overlap_expert_comm else {})
    found = [(name, value, reason) for name, (value, reason) in chosen.items()]
    cluster = config.cluster
    on_gpu = cluster.device == "cuda" or (cluster.device == "auto" and cluster.gpu is not None)
    if on_gpu and ALLOCATOR_ALIAS not in config.launch.env:
        found.append((ALLOCATOR_ENV, *ALLOCATOR_DEFAULT))
    interface = config.cluster.interface
    return found + [(name, interface, reason) for name, reason in INTERFACE_ENV.items() if interface is not None]


def program_path() -> str:
    """The absolute path of pretrain/main.py in this installation."""
    return str(own_packages.ROOT / "pretrain" / "main.py")


def make_plan(
    config: Config,
    source: str,
    overrides: Sequence[str],
    environ: Mapping[str, str],
    program: str | None = None,
    host: str | None = None,
) -> LaunchPlan:
    """The plan of a config with `overrides`. `source` is the path of its file or the name of a shipped config.

    On one node the port is 0 unless launch.master_port is set. The agent then binds a free port itself, and no other
    process can take that port in between. On several nodes, every machine runs the same line with the address `host` of
    one of them.
    """
    launch = config.launch
    single = launch.nodes == 1
    rendezvous = f"{LOOPBACK}:{launch.master_port or 0}" if single else f"{host or 'HOST'}:{launch.master_port or DEFAULT_PORT}"
    defaults = {name: value for name, value, _ in rank_env(config)} | (LOOPBACK_ENV if single else {})
    env = {name: value for name, value in defaults.items() if not environ.get(name)}
    if environ.get(ALLOCATOR_ALIAS):
        env.pop(ALLOCATOR_ENV, None)
    return LaunchPlan(
        folder=folder_of(config),
        program=program or program_path(),
        arguments=("--config", source, *overrides),
        nodes=launch.nodes,
        processes_per_node=launch.processes_per_node,
        rendezvous=rendezvous,
        name=config.run.name,
        env=tuple(sorted({**env, **launch.env}.items())),
        watch=make_watch_policy(config),
        shared_imports=launch.shared_imports,
    )


def torchrun_line(plan: LaunchPlan) -> str:
    """The command quoted for a shell, with the environment in front of it."""
    env = [f"{name}={shlex.quote(value)}" for name, value in plan.env]
    return " ".join([*env, shlex.join(plan.argv)])


def manual_start_text(plan: LaunchPlan) -> str:
    """Instructions for starting the ranks of several machines by hand, without a scheduler."""
    return (
        f"# on each of the {plan.nodes} machines, HOST replaced by the address of one of them;\n"
        f"# the run folder and the data must be the same files everywhere (a shared file system):\n{torchrun_line(plan)}"
    )


def check_local(config: Config, environ: Mapping[str, str]) -> list[Problem]:
    """What keeps the local launcher from running a config: several nodes, or variables in the ranks' environment."""
    nodes = config.launch.nodes
    if config.launch.target != "local":
        return []
    if nodes == 1:
        return check_environment({**environ, **config.launch.env})
    fix = "--dry-run prints the line to run by hand on each machine; or set launch.target=slurm, or launch.nodes=1"
    return [Problem("launch.nodes", nodes, "launch.target=local starts ranks on this machine only", fix)]
