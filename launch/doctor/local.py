"""The check-up of this machine. In: a config, a request. Out: facts and figures in the request's folder; no process left.

Torch-free.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from configs.schema import Config
from launch.doctor.node import look
from launch.doctor.request import NETWORK, NETWORK_LOG, Request
from launch.doctor.results import ready_nodes
from launch.local.parent_guard import MARK_NAME, clear_up
from launch.plan import make_plan

NETWORK_S = 180.0


def probe_path() -> str:
    """launch/doctor/network_probe.py of the installed package, from any working folder."""
    return str(Path(__file__).resolve().with_name("network_probe.py"))


def probe_arguments(request: Request) -> list[str]:
    sizes = ",".join(map(str, request.sizes.network_mib))
    return ["--out", str(Path(request.folder) / NETWORK), "--sizes-mib", sizes]


def check_here(config: Config, request: Request, node: str, environ: Mapping[str, str]) -> None:
    """The node's facts; then its ranks, where there are several and they can be started. Raises OSError: the folder."""
    look(request, node)
    several = request.processes_per_node > 1 and request.sizes.network_mib
    if several and ready_nodes(Path(request.folder), request, [node]):
        _measure(config, request, environ)


def _measure(config: Config, request: Request, environ: Mapping[str, str]) -> None:
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
        pass  # What the ranks came to know stands in their file, and that they did not end is read from it.
    finally:
        agent.kill()
        agent.wait()
        clear_up(mark, 0.0)
