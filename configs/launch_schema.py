"""The `launch` section: where and how a run starts, when its ranks count as hung, and how it is started again.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional

from configs.fields import key


@dataclass
class Container:
    """What the ranks run inside of; the batch step stays on the host, where Slurm's commands are."""

    kind: str = key("none", "How Slurm starts the ranks inside the image.", choices=("none", "pyxis", "apptainer"))
    image: Optional[str] = key(None, "Image, in the form that srun --container-image (pyxis) or apptainer exec accepts.")
    mounts: List[str] = key(
        factory=list, doc="Folders to mount, as HOST:INSIDE. The run folder and the data must have the same path inside."
    )
    python: str = key("python3", "Python inside the image that has phalanx and torch installed.")
    args: List[str] = key(factory=list, doc="Further arguments of srun (pyxis) or apptainer exec.")


@dataclass
class Slurm:
    partition: Optional[str] = key(None, "Slurm partition.")
    account: Optional[str] = key(None, "Slurm account.")
    qos: Optional[str] = key(None, "Slurm quality of service.")
    time: Optional[str] = key(None, "Time limit of one attempt, in the form that sbatch accepts, such as D-HH:MM:SS.")
    constraint: Optional[str] = key(None, "Required node features.")
    gres: Optional[str] = key(None, "Generic resources (gres) of each node.")
    gpus_per_node: Optional[str] = key(None, "GPUs of each node, in the form that sbatch accepts.")
    mem: Optional[str] = key(None, "Memory of each node, in the form that sbatch accepts. 0: all of it.")
    cpus_per_task: Optional[int] = key(None, "CPU cores of the one task on each node, which starts the ranks.", low=1)
    nodelist: Optional[str] = key(None, "Nodes to use.")
    exclude: Optional[str] = key(None, "Nodes to leave out.")
    reservation: Optional[str] = key(None, "Slurm reservation.")
    dependency: Optional[str] = key(None, "Jobs to wait for, in the form that sbatch accepts, such as afterok:123.")
    chain: int = key(
        0,
        "Further jobs that are submitted at once, each to start after the one before has ended: for sites without requeue.",
        low=0,
    )
    extra: List[str] = key(factory=list, doc="Further #SBATCH options, without the prefix, such as --mail-type=END.")
    modules: List[str] = key(factory=list, doc="Environment modules to load, in this order.")
    prologue: List[str] = key(
        factory=list, doc="Shell commands at the start of the batch script. Each item is a complete command."
    )
    srun_args: List[str] = key(factory=list, doc="Further arguments of srun, such as --cpu-bind=none.")
    python: Optional[str] = key(None, "Python on the compute nodes that has phalanx installed. null: the one that submits.")
    container: Container = key(factory=Container)
    min_nodes: Optional[int] = key(
        None, "Fewest nodes to continue with when launch.nodes are not available. null: wait for all.", low=1
    )
    stop_before_s: float = key(
        120.0, "Seconds before the time limit at which the run saves and stops. Slow saves make it stop earlier.", low=0
    )
    spare_nodes: int = key(
        0, "Nodes beyond launch.nodes that the job asks for and that stand ready for a restart in place.", low=0, high=1024
    )
    requeue: bool = key(
        True,
        "Restart with scontrol requeue after preemption, time limit, crash or node failure, where no restart in place is possible.",
    )
    max_attempts: int = key(50, "Attempts of one submission, whatever ended them.", low=1)
    max_without_progress: int = key(
        2, "Crashes or hangs in a row without a new checkpoint after which the run is given up.", low=1
    )
    exclude_after_failures: int = key(
        2, "Failures of one node in a submission after which later attempts leave it out. 0: never.", low=0
    )


@dataclass
class Watch:
    """When ranks count as hung, and nodes as slow; the launcher's watchdog looks from outside of the ranks."""

    step_timeout_s: Optional[float] = key(
        None,
        "Longest time in a step without progress of a rank, in seconds. null: 20 median steps, at least 300 s. 0: no limit.",
        low=0,
    )
    start_timeout_s: float = key(
        1800.0,
        "The same limit for the first step and outside steps: imports, data, restore, save, validation. 0: no limit.",
        low=0,
    )
    stacks: bool = key(True, "Write the Python stacks of hung ranks before the attempt is ended.")
    straggler_ratio: Optional[float] = key(
        1.5, "A rank is reported as slow above this many times the median time of all ranks. null: not checked.", above=1
    )
    probe_interval_steps: Optional[int] = key(
        20, "Steps between two timings of a small matrix product on every rank, which find slow ranks. null: never.", low=1
    )
    per_rank_files_max: int = key(
        256, "Up to this many ranks, every rank has its own log file. With more, each node has one.", low=0
    )


@dataclass
class Restart:
    """Attempts that follow at once, without Slurm's queue. Preemption and the time limit always go through the queue."""

    in_place: bool = key(
        True,
        "Slurm: after a crash, a hang or a lost node, start the next attempt in the same allocation if enough nodes are left.",
    )
    max_local: int = key(
        0,
        "Local launcher: restarts after crashes and hangs, at most. It gives up after two in a row without a new checkpoint.",
        low=0,
    )
    standby_after_s: Optional[float] = key(
        60.0,
        "Seconds after the start of an attempt, when a process on each machine begins to import the libraries for the next attempt "
        "in place. null: never.",
        low=0,
    )


@dataclass
class Launch:
    target: str = key("local", "Where the run starts: on this machine or through Slurm.", choices=("local", "slurm"))
    nodes: int = key(1, "Number of machines.", low=1)
    processes_per_node: int = key(1, "Ranks on each machine. On GPU nodes one per GPU.", low=1)
    env: Dict[str, str] = key(factory=dict, doc="Environment variables of every rank.")
    shared_imports: bool = key(
        True,
        "Import the libraries once on each machine, and fork its ranks from that process. false: each rank imports them itself, as "
        "with plain torchrun.",
    )
    master_port: Optional[int] = key(
        None, "Port of the rendezvous. null: a free one (local), or one derived from the job id (Slurm).", low=1024, high=65535
    )
    slurm: Slurm = key(factory=Slurm)
    watch: Watch = key(factory=Watch)
    restart: Restart = key(factory=Restart)
