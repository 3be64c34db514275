"""A private Slurm on this machine: munged, slurmctld and virtual nodes, real ones of their kind, as root, without systemd.

Everything lies in one folder; its processes are this process's children and die with it. A node has its own hostname,
/etc/hosts, /dev/shm and PID namespace, so that SIGKILL to its first process is a power-off. Nothing of the machine's own
configuration is touched.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel", "unshare", "setpriv")

_CONF = """\
ClusterName=private
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdSpoolDir={folder}/spool/%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
ReturnToService=1
JobRequeue=1
SlurmctldTimeout=30
SlurmdTimeout=5
MessageTimeout=30
TCPTimeout=1
KillWait=10
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=DEFAULT CPUs=4 RealMemory=8192 State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""
# MessageTimeout: what a busy node has not confirmed within it, Slurm 22.05 sends once more a minute later, and stops the
# tasks of the job's next attempt.
# $1: the folder, $2: the node, $3: further commands. The namespaces die with the shell, whose pid is the node's power switch.
_NODE = """\
hostname "$2"; mount --bind "$1/hosts" /etc/hosts; mount -t tmpfs tmpfs /dev/shm
eval "$3"
slurmd -D -N "$2" & wait $!
"""


def missing() -> str:
    """Why no cluster can be had here; empty: it can."""
    if os.geteuid() != 0:
        return "the private Slurm needs root (for namespaces and munge)"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (make slurm, or apt-get install {' '.join(PACKAGES)})" if absent else ""


@contextmanager
def started(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, in its folder, until the context ends."""
    cluster.folder.mkdir(exist_ok=True)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Cluster:
    """`nodes` virtual nodes named node1 …, 4 cores each; partition main, and urgent that preempts it (grace 20 s).

    `settings` are further lines of slurm.conf, which win over those above. `setup` are shell commands that each node runs
    before its slurmd.
    """

    def __init__(self, folder: Path, nodes: int = 5, settings: str = "", setup: str = "") -> None:
        self.folder, self._settings, self._setup = folder, settings, setup
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port = 0

    @property
    def env(self) -> dict[str, str]:
        """The environment in which Slurm's commands mean this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        for name in ("run", "log", "state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._port = _free_ports(1 + len(self.nodes))
        self._write_files()
        run = self.folder / "run"
        self._spawn(
            "munged", "munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key", f"--socket={run}/munge.sock",
            f"--pid-file={run}/munged.pid", f"--log-file={self.folder}/log/munged.log", f"--seed-file={self.folder}/state/seed",
        )  # fmt: skip
        self.wait_for((run / "munge.sock").exists, "munged's socket", 60)
        self.start_controller()
        for node in self.nodes:
            self.power_on(node)
        self.wait_for(lambda: self.node_states().count("idle") == len(self.nodes), "all nodes idle", 120)

    def stop(self) -> None:
        """What runs on the nodes dies with them."""
        for name in list(self._processes):
            self.power_off(name)

    def start_controller(self) -> None:
        self._spawn("slurmctld", "slurmctld", "-D")
        self.wait_for(lambda: self._run("scontrol", "ping").returncode == 0, "slurmctld to answer", 60)

    def kill_controller(self) -> None:
        """SIGKILL: as if its machine had crashed."""
        self.power_off("slurmctld")

    def power_on(self, node: str) -> None:
        spool = self.folder / "spool" / node
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir()
        unshare = ["unshare", "--uts", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._spawn(node, *unshare, "bash", "-c", _NODE, "node", str(self.folder), node, self._setup)

    def power_off(self, name: str) -> None:
        """A node, or a daemon."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    @property
    def off(self) -> list[str]:
        """Nodes without power."""
        return [node for node in self.nodes if node not in self._processes]

    def node_states(self) -> list[str]:
        return self._call("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()

    def restore(self) -> None:
        """As after the start: all nodes powered and idle, no job, for the next test."""
        self._call("scancel", "--user=root")
        for node in self.off:
            self.power_on(node)
        self.wait_for(self._are_idle_again, "all nodes idle again", 180)

    def _are_idle_again(self) -> bool:
        """A node that a busy machine has kept from answering stays down until it is resumed."""
        # A test may have put a site's wrapper before sinfo, which prints lines of its own.
        rows = [line.split() for line in self._call("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()]
        states = {row[0]: row[1] for row in rows if len(row) == 2 and row[0] in self.nodes}
        if down := [node for node, state in states.items() if state.startswith("down")]:
            self._run("scontrol", "update", f"nodename={','.join(down)}", "state=resume")
        return list(states.values()) == ["idle"] * len(self.nodes)

    def wait_for(self, what: Callable[[], bool], words: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, f"{words}: not within {timeout_s:g} s; see {self.folder}/log"
            time.sleep(0.1)

    def _write_files(self) -> None:
        rows = [f"NodeName={node} NodeAddr=127.0.1.{i} Port={self._port + i}" for i, node in enumerate(self.nodes, 1)]
        text = _CONF.format(folder=self.folder, port=self._port, nodes="\n".join(rows))
        (self.folder / "slurm.conf").write_text(text + self._settings.replace("{folder}", str(self.folder)))
        if _slurm_release() >= (23, 2):
            # Newer ones start no slurmd without systemd or this line; 22.05 starts none with it.
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        hosts = [line for line in Path("/etc/hosts").read_text().splitlines() if not line.startswith("127.0.1.")]
        hosts += [f"127.0.1.{i} {node}" for i, node in enumerate(self.nodes, 1)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))

    def _spawn(self, name: str, *command: str) -> None:
        """A child that is killed when this process ends, however it ends."""
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self._processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=60)

    def _call(self, *command: str) -> str:
        done = self._run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}; see {self.folder}/log"
        return done.stdout


def _slurm_release() -> tuple[int, int]:
    """(24, 11) where slurmd says that it is slurm-wlm 24.11.5."""
    said = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", said)
    assert found, f"slurmd -V says {said!r}"
    return int(found[1]), int(found[2])


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for base in range(11000 + os.getpid() % 400 * 20, 32000, 20):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, made in enumerate(sockets):
                made.bind(("", base + offset))
            return base
        except OSError:
            continue
        finally:
            for made in sockets:
                made.close()
    raise AssertionError("no free ports below 32000")
