"""The meeting point of a job's agents: a port that is free, and a name that has an address."""

from __future__ import annotations

import socket

import pytest

from launch.slurm.node_agent import fill_command
from launch.slurm.rendezvous import PORT_BASE, RendezvousError, choose_host, choose_port, is_free


def test_a_taken_port_is_passed_over() -> None:
    """By real sockets: the job's first port is taken on one address only, which is enough to make it useless."""
    with socket.socket() as listener:
        first = choose_port(4242, 0)
        listener.bind(("127.0.0.1", first))
        listener.listen()
        assert not is_free(first)
        second = choose_port(4242, 0)
        assert second > first and is_free(second)


def test_attempts_and_jobs_begin_at_different_ports() -> None:
    ports = {choose_port(job, restarts, free=lambda _: True) for job in (100, 101) for restarts in range(3)}
    assert len(ports) == 6 and all(PORT_BASE <= port < 30000 for port in ports)


def test_no_free_port_is_said_with_its_number() -> None:
    with pytest.raises(RendezvousError, match=r"port 23456 on .* launch.master_port must be free"):
        choose_port(1, 0, fixed=23456, free=lambda _: False)
    with pytest.raises(RendezvousError, match=r"ports 20001 to 20200 .* all taken"):
        choose_port(1, 0, free=lambda _: False)
    assert choose_port(1, 0, fixed=23456, free=lambda _: True) == 23456


def test_the_node_address_helps_where_the_name_does_not_resolve() -> None:
    assert choose_host("localhost", "") == "localhost"
    assert choose_host("gpu001.invalid", "127.0.0.1") == "127.0.0.1"
    assert choose_host("gpu001.invalid", "::1") == "[::1]"
    with pytest.raises(RendezvousError, match=r"gpu001.invalid, the first node .* does not resolve .* not known"):
        choose_host("gpu001.invalid", "")


def test_node_0_is_the_host_whatever_its_name() -> None:
    """torchrun would compare names and addresses, which fails for 127.0.1.1."""
    command = [
        "torchrun",
        "--rdzv-endpoint",
        "127.0.0.1:20001",
        "--rdzv-conf",
        "is_host={is_host}",
        "--local-addr",
        "{local_addr}",
    ]
    for node, expected in (("0", "is_host=1"), ("3", "is_host=0")):
        filled = fill_command(command, {"SLURM_NODEID": node})
        assert filled[4] == expected and filled[6] and "{" not in filled[6]


def test_an_agent_whose_own_name_has_no_address_tells_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "nowhere.invalid")
    assert fill_command(["--rdzv-endpoint", "127.0.0.1:20001", "{local_addr}"], {})[2] == "127.0.0.1"
