"""The check-up of this machine. In: a config and a request. Out: facts and measurements in the request's folder.

No process of the check-up is left when it returns.

Torch-free.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from configs.schema import Config
from launch.doctor.node import write_node_facts
from launch.doctor.request import NETWORK, NETWORK_LOG, CheckupRequest
from launch.doctor.results import ready_nodes
from launch.local.parent_guard import MARK_NAME, clear_up
from launch.plan import make_plan

NETWORK_S = 180.0


def probe_path() -> str:
    """launch/doctor/network_probe.py of the installed package, from any working folder."""
    return str(Path(__file__).resolve().with_name("network_probe.py"))


def probe_arguments(request: CheckupRequest) -> list[str]:
    """The arguments of launch/doctor/network_probe.py for this request."""
    sizes = ",".join(map(str, request.sizes.network_mib))
    return ["--out", str(Path(request.folder) / NETWORK), "--sizes-mib", sizes]


def check_here(config: Config, request: CheckupRequest, node: str, environ: Mapping[str, str]) -> None:
    """Collect the facts of this machine, then measure the network between its ranks if several can be started.

    Raises OSError if the request's folder cannot be written.
    """
    write_node_facts(request, node)
    several = request.processes_per_node > 1 and request.sizes.network_mib
    if several and ready_nodes(Path(request.folder), request, [node]):
        _measure(config, request, environ)


def _measure(config: Config, request: CheckupRequest, environ: Mapping[str, str]) -> None:
    launch = replace(config.launch, target="local", nodes=1, processes_per_node=request.processes_per_node)
    plan = make_plan(replace(config, launch=launch), "", (), environ, program=probe_path())
    plan = replace(plan, arguments=tuple(probe_arguments(request)))
    mark = secrets.token_hex(8)
    env = {**environ, **dict(plan.env), MARK_NAME: mark}
    with open(Path(request.folder) / NETWORK_LOG, "ab") as log:
        agent = subprocess.Popen(
            plan.argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        agent.wait(NETWORK_S)
    except subprocess.TimeoutExpired:
        pass  # The ranks wrote each finished part to their file. The reader sees there that they did not end.
    finally:
        agent.kill()
        agent.wait()
        clear_up(mark, 0.0)
