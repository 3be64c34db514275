"""Runs torchrun as its command line says. In: torchrun's arguments, the environment. Out: torchrun's exit code.

With --run-path, which our launchers write unless launch.shared_imports is false, the ranks are forked from one process that has
imported what they need (launch/fork_server.py).

Variables can change what torchrun does: PET_MODULE=1 stands for --module, PYTHON_EXEC for another Python. A site, a Kubernetes
operator or an earlier experiment may have left them in the environment. The command line states everything, so they are
removed, for torchrun and for the ranks.

Torchrun's imports run without garbage collection, which takes 0.8 s of the 2.1 s of CPU time that torchrun needs before it
starts the ranks. Ranks that are started by hand can use plain torchrun.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping

from pretrain.rank.log_file import guard_logs
from pretrain.run.process import importing

# PET_X is the default of torchrun's option --x. The others are read by torch.distributed.elastic, or describe a rank of another
# torchrun that this process descends from.
_PREFIXES = ("PET_", "TORCHELASTIC_", "TORCH_ELASTIC_")
_NAMES = ("PYTHON_EXEC",)


def clean(environ: MutableMapping[str, str]) -> list[str]:
    """Remove what would change torchrun's command line from `environ`. Returns the names of the removed variables, sorted.

    LOGLEVEL stays if it names a level of `logging`, in capitals as torchrun needs it.
    """
    removed = [name for name in environ if name.startswith(_PREFIXES) or name in _NAMES]
    level = environ.get("LOGLEVEL", "")
    if level.upper() in logging.getLevelNamesMapping():
        environ["LOGLEVEL"] = level.upper()
    elif "LOGLEVEL" in environ:
        removed.append("LOGLEVEL")
    for name in removed:
        del environ[name]
    return sorted(removed)


if __name__ == "__main__":
    guard_logs()
    if found := clean(os.environ):
        print(f"phalanx: torchrun runs without the variables {', '.join(found)}", file=sys.stderr, flush=True)
    # torchrun sets this default too, for several ranks, but only after torch has read the variable.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with importing():
        from launch.agent import main
    main()
