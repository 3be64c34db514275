"""Environment variables that decide whether a rank can start. In: an environment. Out: a number of threads, problems.

Torch-free.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping

from configs.errors import Problem

_THREADS = re.compile(r"\s*([1-9]\d*)\s*(,\s*[1-9]\d*\s*)*")


def num_threads(environ: Mapping[str, str]) -> int:
    """Threads of a rank on CPU: OMP_NUM_THREADS, or 1 where it is unset or empty. Of a list, the first entry.

    OpenMP takes a list with one number for each level of nested parallel regions (OpenMP 5.2, section 21.1.2). Raises
    ValueError if the variable holds anything else; `check_environment` says so before.
    """
    return int(environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip() or 1)


def check_environment(environ: Mapping[str, str]) -> list[Problem]:
    """Problems of variables that would end every rank in a library's traceback."""
    problems = []
    threads, interface = environ.get("OMP_NUM_THREADS", ""), environ.get("GLOO_SOCKET_IFNAME", "")
    if threads and not _THREADS.fullmatch(threads):
        rule = "must be a number of threads of at least 1, or a list of such numbers"
        problems.append(Problem("OMP_NUM_THREADS", threads, rule, "unset it, or set OMP_NUM_THREADS=1"))
    warnings = environ.get("PYTHONWARNINGS", "")
    if any(entry.strip().startswith("error") for entry in warnings.split(",")):
        rule = "must not turn warnings into errors: megatron-core warns about itself when it is imported"
        problems.append(Problem("PYTHONWARNINGS", warnings, rule, "unset it"))
    known = [name for _, name in socket.if_nameindex()]
    if missing := [name for name in interface.split(",") if name and name not in known]:
        rule = f"must name network interfaces of {socket.gethostname()}, which has {', '.join(known)}; {missing[0]} is not one"
        problems.append(Problem("GLOO_SOCKET_IFNAME", interface, rule, "unset it, or choose an interface of this machine"))
    return problems
