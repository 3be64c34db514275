"""torchrun does what its command line says, whatever the environment holds for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from configs.own_packages import STARTER
from launch.torchrun import clean
from tests.launch.local.test_local import Launch, start

__all__ = ["start"]


def test_what_changes_the_command_line_is_removed() -> None:
    kept = {"PATH": "/bin", "NCCL_DEBUG": "INFO", "TORCH_DISTRIBUTED_DEBUG": "DETAIL", "LOGLEVEL": "WARNING"}
    foreign = {"PET_MODULE": "1", "PET_NNODES": "4", "TORCHELASTIC_RUN_ID": "7", "PYTHON_EXEC": "/bin/false"}
    environ = {**kept, **foreign}
    assert clean(environ) == sorted(foreign) and environ == kept


def test_a_log_level_in_small_letters_is_meant_in_capitals_and_no_level_is_removed() -> None:
    environ = {"LOGLEVEL": "info"}
    assert clean(environ) == [] and environ == {"LOGLEVEL": "INFO"}
    environ = {"LOGLEVEL": "banana"}
    assert clean(environ) == ["LOGLEVEL"] and environ == {}


def test_a_run_under_foreign_variables(start: Callable[..., Launch]) -> None:
    """Each of them ended the run before, in torchrun's traceback."""
    launch = start(PET_MODULE="1", PET_NO_PYTHON="1", PET_SHUTDOWN_TIMEOUT="x", PYTHON_EXEC="/bin/false", LOGLEVEL="banana")
    code, out, err = launch.end()
    assert code == 0 and out.splitlines()[-1] == "step 3", err
    log = (launch.run.log_dir(1) / "torchrun.log").read_text()
    assert "without the variables LOGLEVEL, PET_MODULE, PET_NO_PYTHON, PET_SHUTDOWN_TIMEOUT, PYTHON_EXEC" in log


def test_threads_and_interface_are_refused_before_the_start(start: Callable[..., Launch]) -> None:
    launch = start(OMP_NUM_THREADS="many", GLOO_SOCKET_IFNAME="no_such_if0")
    code, _, err = launch.end()
    assert code == 2 and "2 problems:" in err and "OMP_NUM_THREADS = 'many'" in err
    assert not launch.run.path.exists()


def test_pythoninspect_changes_no_exit_code() -> None:
    command = [sys.executable, "-P", STARTER, "tools.cli", "no_such_command"]
    done = subprocess.run(command, env={**os.environ, "PYTHONINSPECT": "1"}, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 2 and b"SystemExit" not in done.stderr
