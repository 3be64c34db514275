"""What makes a process a well-behaved rank. In: the environment. Out: its log, its failure file, its death with its parent.

The contract with our launchers, all of it optional (plain torchrun sets none of it):
    PHALANX_LOG_DIR   folder for rank_N.log (stdout and stderr, also of C code) and rank_N.failure.json
    PHALANX_ATTEMPT   the attempt number that the launcher has claimed
    PHALANX_BEAT_DIR  folder for heartbeats and stacks (pretrain/run/beat.py)
Imports nothing heavy: `prepare` runs before torch is imported, whose failure to import belongs into the rank's log.

Torch-free.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from configs.errors import ConfigError
from pretrain.metrics.screen import screen_of
from pretrain.run.files import write_json
from pretrain.run.folder import EXIT_BAD_INPUT, EXIT_BROKE
from pretrain.run.process import die_with_parent, node_name, open_standard_streams


def prepare(environ: Mapping[str, str] = os.environ) -> None:
    """Before anything heavy is imported: the rank's log, its death with its parent, tracebacks of crashes in C."""
    open_standard_streams()
    redirect_output(environ)
    detach_from_readers()
    # torchrun's agent may be killed: without it, its store is gone too.
    die_with_parent()
    faulthandler.enable()


def run_rank(body: Callable[[], int], environ: Mapping[str, str] = os.environ) -> int:
    """Run a rank's program after `prepare`; returns the exit code.

    ConfigError: the report, without a traceback, exit 2. Any other exception: its traceback, exit 1. Both leave a failure
    file, whose time tells the launcher which rank was the first.
    """
    try:
        return body()
    except ConfigError as error:
        return _report(error, environ)
    except Exception:
        text = traceback.format_exc()
        record_failure(environ, "exception", text)
        print(text, file=sys.stderr, flush=True)
        return EXIT_BROKE


@contextmanager
def refusing_bad_input(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Around a rank's imports: a ConfigError, as from a library whose private names changed, ends like one of the run.

    Its report goes to stderr, its failure file to the launcher, and the process ends with exit code 2.
    """
    try:
        yield
    except ConfigError as error:
        raise SystemExit(_report(error, environ)) from None


def _report(error: ConfigError, environ: Mapping[str, str]) -> int:
    record_failure(environ, "bad_input", str(error))
    print(error, file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


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


def detach_from_readers() -> None:
    """Let a thread write to a terminal or a pipe: one that is paused or unread must not stop the training thread.

    Files stay as they are. What C code prints goes to the descriptor itself, past this.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode) and (screen := screen_of(stream)) is not None:
            setattr(sys, name, screen)
            atexit.register(screen.drain)


def record_failure(environ: Mapping[str, str], kind: str, text: str) -> None:
    """Leave {"rank", "node", "time", "kind": bad_input|exception, "text"} for the launcher. A full disk costs the file only."""
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
