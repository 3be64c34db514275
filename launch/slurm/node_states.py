"""What Slurm says about nodes. In: names of nodes or of a partition. Out: addresses, sizes, and which nodes are gone.

A node that Slurm does not show to this user (another's reservation, a private partition) is unknown, which is not the same
as lost.

Torch-free.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence

from launch.slurm.scheduler import call, rows_of

# Words of sinfo's states of nodes that cannot take a job.
NODE_UNAVAILABLE = ("down", "fail", "drain", "no_respond", "unk", "error", "power", "reboot", "maint", "inval")
# Words of the states whose processes are gone. A node that is being drained, or is to be rebooted later, still runs its job.
NODE_LOST = ("down", "no_respond", "unk", "error", "power", "inval")
# sinfo appends this mark to the state of a node that is not responding.
NOT_RESPONDING = "*"
# A slurmd that takes no connection within this time is away.
ANSWER_S = 5.0


def node_addresses(nodes: Sequence[str]) -> dict[str, str]:
    """Each node's NodeAddr, the name or address by which the controller reaches it. Raises SchedulerError."""
    rows = rows_of(call(["sinfo", "--all", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%o"]), 2)
    return dict(map(tuple[str, str], rows))


def partition_size(partition: str | None) -> int:
    """All nodes of a partition (None: of the default one), drained and lost ones too. 0 if Slurm does not show it.

    Of several partitions (a,b) the largest counts. Raises SchedulerError.
    """
    # sinfo refuses both options at once. A partition that is named is shown although it is hidden.
    where = f"--partition={partition}" if partition else "--all"
    sizes: Counter[str] = Counter()
    for name, count in rows_of(call(["sinfo", where, "--noheader", "--format=%P|%D"]), 2):
        if count.isdecimal() and (partition or name.endswith("*")):
            sizes[name] += int(count)
    return max(sizes.values(), default=0)


def lost_nodes(nodes: Sequence[str]) -> list[str]:
    """Those of `nodes` whose processes are gone: Slurm shows them as down or not responding. Raises SchedulerError.

    A node that Slurm does not show to this user (another's reservation, a private partition) is unknown, not lost.
    """
    rows = rows_of(call(["sinfo", "--all", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T"]), 2)
    states = {node: state.lower() for node, state in rows}
    return [node for node in nodes if _is_lost(states.get(node, ""))]


def answers(node: str) -> bool:
    """Does the node's slurmd take a connection from this machine? Slurm itself notices a dead node minutes later.

    False also if Slurm does not show the node to this user. Raises SchedulerError.
    """
    place = slurmd_place(node)
    return place is not None and accepts(place)


def slurmd_place(node: str) -> tuple[str, int] | None:
    """(address, port) of the node's slurmd. None: Slurm does not show the node to this user. Raises SchedulerError."""
    columns = "NodeAddr:255|,Port:16"
    rows = rows_of(call(["sinfo", "--all", "--noheader", "--Node", f"--nodes={node}", f"--Format={columns}"]), 2)
    return next(((address.strip(), int(port)) for address, port in rows), None)


def accepts(place: tuple[str, int]) -> bool:
    """Does an (address, port) take a connection within ANSWER_S?"""
    try:
        with socket.create_connection(place, ANSWER_S):
            return True
    except OSError:
        return False


def _is_lost(state: str) -> bool:
    return state.endswith(NOT_RESPONDING) or any(word in state for word in NODE_LOST)
