"""Forks the ranks of a machine from one process that has imported their libraries. In: a program. Out: a fork server.

torchrun starts a function instead of a command with --run-path, and multiprocessing's start method `forkserver` forks the
processes of that function from a server. multiprocessing starts its server as a new Python, which would import torch a second
time beside torchrun's process. Here the server is forked from torchrun's process when that has imported torch, and has neither
threads nor a CUDA context. The server imports the rest while torchrun's agent meets those of the other machines.

The environment and the command line that /proc shows are those of torchrun's process for the server and for the ranks. The
launch's mark is therefore found in all of them. `ps` tells them apart by their names: "fork server", and "rank 0" and so on.

Torch-free.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from launch.local.parent_guard import MARK_NAME
from launch.watch.failures import NO_RANK
from launch.watch.processes import FORK_SERVER
from pretrain.run.files import write_json
from pretrain.run.process import IMPORTS_ONLY, die_with_parent, importing, name_process

_CUDA_NOT_INITIALIZED = 3
# Set in the server: its imports have left something behind that does not survive a fork.
_ranks_import = False


def import_for_ranks(program: str, words: Sequence[str]) -> str:
    """Run the imports of a program in this process. Returns why its ranks must repeat them all; empty: they need not.

    The program runs under the name IMPORTS_ONLY, not __main__. An import that fails is repeated by every rank, which reports it
    in its own log.
    """
    argv, sys.argv = sys.argv, [program, *words]
    # torch.cuda.is_available() would initialize CUDA, and CUDA fails in a process that is forked afterwards.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        with importing():
            runpy.run_path(program, run_name=IMPORTS_ONLY)
    except (Exception, SystemExit) as error:
        print(f"phalanx: the ranks repeat an import that failed: {error!r}", file=sys.stderr, flush=True)
    finally:
        del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
        sys.argv = argv
    if cuda_is_initialized():
        return "an import has initialized CUDA"
    if threading.active_count() > 1:
        return f"an import has started the thread {threading.enumerate()[-1].name}"
    return ""


def cuda_is_initialized() -> bool:
    """Whether this process has initialized the CUDA driver. CUDA then fails in processes that are forked from it."""
    if "libcuda.so" not in Path("/proc/self/maps").read_text():
        return False
    count = ctypes.c_int()
    return ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count)) != _CUDA_NOT_INITIALIZED


def start_fork_server(folder: Path, program: str, words: Sequence[str]) -> int:
    """Fork the server that multiprocessing's start method `forkserver` uses from now on. Returns its pid. Raises OSError.

    The server imports what `program` needs while this process goes on. `folder`: a folder that only this user can enter, for
    the server's socket. Who can write to the socket can run code here.
    """
    _start_unmarked_tracker()
    address = str(folder / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        alive, keep_alive = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(keep_alive)
                _serve(listener.detach(), alive, program, words)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(0)
    os.close(alive)
    server: Any = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, keep_alive, pid
    return pid


def _serve(listener: int, alive: int, program: str, words: Sequence[str]) -> None:
    """Be the fork server until the pipe `alive` ends. `listener`: the descriptor of the server's socket."""
    name_process(FORK_SERVER)
    die_with_parent()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # torch takes a KeyboardInterrupt in a rank for a good end, and would wait for its result for ever.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if why_not := import_for_ranks(program, words):
        print(f"phalanx: each rank imports its libraries itself: {why_not}", file=sys.stderr, flush=True)
        global _ranks_import
        _ranks_import = True
    forkserver.main(listener, alive, [])


def _start_unmarked_tracker() -> None:
    """Start the process that removes the semaphores of killed processes, without the launch's mark.

    It ends by itself when the last process of the launch has ended. With the mark it would be killed before it can clean up.
    """
    mark = os.environ.pop(MARK_NAME, None)
    try:
        resource_tracker.ensure_running()
    finally:
        if mark is not None:
            os.environ[MARK_NAME] = mark


def run_program(path: str, *words: str) -> None:
    """Do in a forked process what `python -u PATH WORDS` does. Raises SystemExit with the program's exit code, None for 0."""
    if _ranks_import:
        os.execv(sys.executable, [sys.executable, "-u", path, *words])
    sys.argv = [path, *words]
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(write_through=True)
    code: object = None
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except Exception:
        # torch would show the traceback in its own log only.
        traceback.print_exc()
        code = 1
    # multiprocessing ends a process with os._exit.
    atexit._run_exitfuncs()
    # torch takes SystemExit(0) for a function that returns, whose process then waits for all others.
    raise SystemExit(code or None)


def report_killed_server(pid: int) -> None:
    """Say so on stderr and in a failure file if a signal has killed the server. All ranks of this machine die with it."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if not found or not os.WIFSIGNALED(status):
        return
    number = os.WTERMSIG(status)
    text = f"the process that this machine's ranks are forked from was killed by signal {number} ({signal.strsignal(number)})"
    print(f"phalanx: {text}", file=sys.stderr, flush=True)
    if directory := os.environ.get("PHALANX_LOG_DIR"):
        failure = {"rank": NO_RANK, "time": time.time(), "kind": "killed", "text": text}
        write_json(Path(directory) / f"rank_{NO_RANK}.failure.json", failure)
