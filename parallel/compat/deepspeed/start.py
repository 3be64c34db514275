"""DeepSpeed made ready in a process that torchrun or our launcher started. Imports DeepSpeed: 3 s."""

from __future__ import annotations

import logging
import sys

from configs.errors import ConfigError
from parallel.compat.private_names import LibraryImports, require_names
from parallel.compat.supported import version_problem

if problem := version_problem("deepspeed"):
    raise ConfigError(problem)
with LibraryImports(__name__):
    import deepspeed
    import deepspeed.ops
require_names(__name__)


def start_deepspeed() -> None:
    """Quiet logs, no search for compilers, its communication over our process group, and a name that its launcher binds."""
    # DeepSpeed logs to stdout, which is not its to write to; what it warns of is decided by the legality table.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").handlers = [logging.StreamHandler(sys.stderr)]
    name_no_operators()
    deepspeed.init_distributed(auto_mpi_discovery=False)
    bind_communication()


def name_no_operators() -> None:
    """Keep DeepSpeed from looking which of its operators could be compiled here.

    Fault: it probes compilers for every kernel that it has (linker errors on stderr), and compiles a shared-memory
    all-reduce for inference (50 s, once a machine) that nothing here calls.
    """
    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]


def bind_communication() -> None:
    """Bind `deepspeed.dist`, which only DeepSpeed's own launcher binds.

    Fault: the engine reads the name; without its launcher it is None and the first collective raises an AttributeError.
    """
    deepspeed.dist = deepspeed.comm  # type: ignore[attr-defined]
