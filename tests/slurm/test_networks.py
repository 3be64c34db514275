"""Nodes with networks of their own, in namespaces on a bridge. The nodes of the other tests share one loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, started
from tests.slurm.world import phalanx, submit

pytestmark = [pytest.mark.slurm, pytest.mark.prove, pytest.mark.timeout(600)]

CONTROLLER = 254
# In the node: $1 the folder, $2 the node, $3 its address, $4 not empty: no IPv4 on its loopback.
_NODE = """\
hostname "$2"; mount --bind "$1/hosts.$2" /etc/hosts; mount -t tmpfs tmpfs /dev/shm
touch "$1/run/$2.there"
until ip link set dev eth0 up 2>/dev/null; do sleep 0.05; done
ip link set dev lo up; ip addr add "$3" dev eth0 nodad
[ -z "$4" ] || ip -4 addr flush dev lo
slurmd -D -N "$2" & wait $!
"""


class NetworkedCluster(Cluster):
    """Two nodes, each with an interface eth0 of its own. Each node's hosts file gives its own name as 127.0.1.1, as Debian does.

    `only_ipv6`: there are no IPv4 addresses, not even on the nodes' loopbacks.
    """

    def __init__(self, folder: Path, only_ipv6: bool) -> None:
        super().__init__(folder, 2, "CommunicationParameters=EnableIPv6,DisableIPv4\n" if only_ipv6 else "")
        self._only_ipv6 = only_ipv6
        self._bridge = f"phx{os.getpid()}"[:12]

    def start(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        _ip("addr", "add", f"{self.address(CONTROLLER)}/{64 if self._only_ipv6 else 24}", "dev", self._bridge, "nodad")
        super().start()

    def stop(self) -> None:
        super().stop()
        # The nodes' ends of the cables go with the nodes.
        _ip("link", "del", self._bridge)

    def address(self, number: int) -> str:
        return f"fd5a:77::{number}" if self._only_ipv6 else f"10.213.77.{number}"

    def power_on(self, node: str) -> None:
        spool, number = self.folder / "spool" / node, int(node.removeprefix("node"))
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir()
        there = self.folder / "run" / f"{node}.there"
        unshare = [
            "unshare",
            "--uts",
            "--mount",
            "--propagation",
            "slave",
            "--pid",
            "--net",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        address = f"{self.address(number)}/{64 if self._only_ipv6 else 24}"
        only_ipv6 = "yes" if self._only_ipv6 else ""
        self._spawn(node, *unshare, "bash", "-c", _NODE, "node", str(self.folder), node, address, only_ipv6)
        self.wait_for(there.exists, f"{node}'s namespaces", 20)
        (shell,) = Path(f"/proc/{self._processes[node].pid}/task/{self._processes[node].pid}/children").read_text().split()
        cable = f"{self._bridge}.{number}"
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", shell)
        _ip("link", "set", cable, "master", self._bridge, "up")

    def _write_files(self) -> None:
        super()._write_files()
        config = self.folder / "slurm.conf"
        text = config.read_text().replace("localhost(127.0.0.1)", f"localhost({self.address(CONTROLLER)})")
        for number, _ in enumerate(self.nodes, 1):
            text = text.replace(f"NodeAddr=127.0.1.{number} ", f"NodeAddr={self.address(number)} ")
        config.write_text(text)
        for own in self.nodes:
            rows = [f"{'::1' if self._only_ipv6 else '127.0.0.1'} localhost"]
            for number, node in enumerate(self.nodes, 1):
                rows.append(f"127.0.1.1 {node}" if node == own and not self._only_ipv6 else f"{self.address(number)} {node}")
            (self.folder / f"hosts.{own}").write_text("\n".join(rows) + "\n")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture(params=[False, True], ids=["own-name-is-127.0.1.1", "only-ipv6"])
def networked(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    if why := missing() or ("" if shutil.which("ip") else "not installed: ip (iproute2)"):
        pytest.skip(why)
    cluster = NetworkedCluster(tmp_path / "networked", request.param)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    with started(cluster):
        yield cluster


def _on_node(command: str) -> str:
    words = ["srun", "--nodes=1", "--nodelist=node1", "bash", "-c", command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def test_nodes_with_networks_of_their_own_meet(networked: Cluster, run_config: Path, tmp_path: Path) -> None:
    """Both nodes must reach the rendezvous on the first one, and each other."""
    own, of_all = _on_node("getent ahosts node1"), _on_node("ip -4 -oneline addr show up")
    assert own.startswith("127.0.1.1 ") if of_all else own.startswith("fd5a:77::1 "), (own, of_all)
    words = ["cluster.interface=eth0", "run.steps=4", "checkpoint.interval_steps=2", "launch.slurm.max_without_progress=1"]
    run = submit(networked, run_config, tmp_path / "run", *words)
    life = run.wait_over()
    assert life.state == "finished" and run.events("job_attempt")[0]["nodes"] == ["node1", "node2"], run.story()
    assert run.steps() == 4 and "finished" in phalanx("status", str(tmp_path / "run")).stdout
