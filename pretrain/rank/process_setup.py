"""Preparing a process to be a rank. In: the environment. Out: its log, its failure file, and its death with its parent.

The contract with our launchers is optional. Plain torchrun sets none of these variables:
    PHALANX_LOG_DIR   folder for rank_N.log (stdout and stderr, also of C code) and rank_N.failure.json
    PHALANX_ATTEMPT   the attempt number that the launcher has claimed
    PHALANX_BEAT_DIR  folder for heartbeats and stacks (pretrain/run/beat.py)
This module imports nothing heavy. `prepare` runs before torch is imported, so that a failing import is in the rank's log.

Torch-free.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from configs.errors import ConfigError, DiskError
from pretrain.metrics.screen import screen_of
from pretrain.rank.log_file import guard_logs, is_file
from pretrain.run.files import write_json
from pretrain.run.folder import EXIT_BAD_INPUT, EXIT_BROKE
from pretrain.run.process import die_with_parent, name_process, node_name, open_standard_streams


def prepare(environ: Mapping[str, str] = os.environ) -> None:
    """Open the rank's log, let the rank die with its parent, and enable tracebacks of crashes in C.

    Call it before anything heavy is imported.
    """
    open_standard_streams()
    redirect_output(environ)
    detach_streams()
    # torchrun's agent may be killed, and the store that the ranks need ends with it.
    die_with_parent()
    name_process(f"rank {_rank(environ)}")
    faulthandler.enable()


def run_rank(body: Callable[[], int], environ: Mapping[str, str] = os.environ) -> int:
    """Run a rank's program after `prepare`. Returns the exit code.

    A ConfigError prints its report without a traceback and gives exit code 2, a DiskError 1. Any other exception prints its
    traceback and gives exit code 1. All leave a failure file, whose time tells the launcher which rank failed first.
    """
    try:
        return body()
    except ConfigError as error:
        return report_refusal(error, environ)
    except Exception:
        text = traceback.format_exc()
        record_failure(environ, "exception", text)
        print(text, file=sys.stderr, flush=True)
        return EXIT_BROKE


@contextmanager
def refusing_bad_input(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """A context for a rank's imports, in which a ConfigError ends the process as it would during the run.

    A library whose private names changed raises one, for example. Its report goes to stderr, its failure file to the launcher,
    and the process exits with code 2.
    """
    try:
        yield
    except ConfigError as error:
        raise SystemExit(report_refusal(error, environ)) from None


def report_refusal(error: ConfigError, environ: Mapping[str, str]) -> int:
    """Write the failure file and print the report. Returns the exit code."""
    record_failure(environ, "exception" if isinstance(error, DiskError) else "bad_input", str(error))
    print(error, file=sys.stderr, flush=True)
    return exit_code_of(error)


def exit_code_of(error: ConfigError) -> int:
    """Of a rank. What a disk refuses may succeed in the next attempt; bad input never does."""
    return EXIT_BROKE if isinstance(error, DiskError) else EXIT_BAD_INPUT


def redirect_output(environ: Mapping[str, str]) -> None:
    """Send stdout and stderr to this rank's log, line by line, when a launcher asks for logs."""
    directory = environ.get("PHALANX_LOG_DIR")
    if not directory:
        return
    path = Path(directory) / f"rank_{_rank(environ)}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(line_buffering=True)


def detach_streams() -> None:
    """Replace stdout and stderr by streams that neither block nor raise. The output of C code goes to the descriptor directly.

    On a terminal or a pipe, a thread writes: a paused terminal or an unread pipe doesn't block the training thread. On a file,
    the text that a full or failing disk refuses is lost, and the log says so.
    """
    guard_logs()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not is_file(stream.fileno()) and (screen := screen_of(stream)) is not None:
            setattr(sys, name, screen)
            atexit.register(screen.drain)


def record_failure(environ: Mapping[str, str], kind: str, text: str) -> None:
    """Write the failure file for the launcher: {"rank", "node", "time", "kind": bad_input|exception, "text"}.

    When the disk refuses the file, a line on stderr says so.
    """
    directory = environ.get("PHALANX_LOG_DIR")
    if not directory:
        return
    rank = _rank(environ)
    failure = {"rank": rank, "node": node_name(environ), "time": time.time(), "kind": kind, "text": text}
    try:
        write_json(Path(directory) / f"rank_{rank}.failure.json", failure)
    except OSError as error:
        print(f"phalanx: no failure file ({error})", file=sys.stderr)


def _rank(environ: Mapping[str, str]) -> int:
    text = environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0
