"""Where the agents of all nodes meet. In: the job and its first node. Out: a host name and a free port of that node.

The batch step of a job runs on the job's first node, so it can see which ports are taken there. The agents meet a second
or two later. If another process takes the port in between, the attempt fails, and the next attempt starts its search at
another port.

Torch-free.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The ports lie below Linux's ephemeral range, which begins at 32768, and above most registered ports.
PORT_BASE, PORT_COUNT = 20000, 10000
# The search gives up after this many ports.
_TRIED = 200
# The searches of successive attempts of a job begin this many ports apart.
_ATTEMPT_STRIDE = 997


@dataclass(frozen=True)
class Rendezvous:
    """`host` is a name or an address of the first node, `port` a port of it."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class RendezvousError(Exception):
    """The agents have no place to meet. The message says why and what to do."""


def is_free(port: int) -> bool:
    """Can a process of this machine listen on the port, on all of its addresses?"""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(("", port))
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno == errno.EADDRINUSE:
                return False
            # This machine has no such family of addresses.
    return True


def choose_port(job: int, restarts: int, fixed: int | None = None, free: Callable[[int], bool] = is_free) -> int:
    """`fixed` (launch.master_port), or the first free port after the job's own. Raises RendezvousError if none is free."""
    if fixed is not None:
        if free(fixed):
            return fixed
        name = socket.gethostname()
        raise RendezvousError(
            f"port {fixed} on {name}: launch.master_port must be free; another process listens there; "
            "leave launch.master_port unset, then a free port is chosen"
        )
    first = (job + restarts * _ATTEMPT_STRIDE) % PORT_COUNT
    ports = [PORT_BASE + (first + offset) % PORT_COUNT for offset in range(_TRIED)]
    found = next((port for port in ports if free(port)), None)
    if found is None:
        raise RendezvousError(f"ports {ports[0]} to {ports[-1]} on {socket.gethostname()} are all taken; set launch.master_port")
    return found


def resolves(host: str) -> bool:
    """Does this machine know an address of `host`?"""
    try:
        return bool(socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):
        return False


def choose_host(node: str, address: str, known: Callable[[str], bool] = resolves) -> str:
    """The node's Slurm name, or its NodeAddr if the name does not resolve. Raises RendezvousError if neither resolves."""
    for host in dict.fromkeys((node, address)):
        if host and known(host):
            return _bracketed(host)
    raise RendezvousError(
        f"{node}, the first node of the job, does not resolve to an address (NodeAddr in slurm.conf: {address or 'not known'}); "
        "the ranks of all nodes meet there: have its name added to DNS or /etc/hosts on every node"
    )


def _bracketed(host: str) -> str:
    """An IPv6 address needs brackets before a port."""
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


def main(argv: Sequence[str]) -> int:
    """Print a free port of this machine, for a batch script."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.rendezvous", description="Prints a free port of this machine.")
    parser.add_argument("job", type=int, help="the job id, at which the search begins")
    print(choose_port(parser.parse_args(list(argv)).job, 0))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
