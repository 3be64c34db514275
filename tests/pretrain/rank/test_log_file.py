"""A log that the disk refuses loses text, not the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pretrain.rank.log_file import log_stream


def test_a_log_on_a_full_disk_raises_nothing_and_says_what_is_lost(tmp_path: Path) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115  its descriptor is given to another file below
    descriptor, stream = full.fileno(), log_stream(full)
    print("lost", file=stream)
    print("also lost", file=stream, flush=True)
    kept = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(kept, descriptor)
    print("kept", file=stream)
    assert (tmp_path / "log").read_text() == "\nphalanx: 15 bytes of this log were lost: No space left on device\nkept\n"
    assert stream.fileno() == descriptor and not stream.isatty()
    os.close(kept)
    full.close()


def test_prints_of_a_process_go_on_when_its_log_can_not_grow(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pretrain.rank.log_file import guard_logs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
print("first")
guard_logs()
resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
for _ in range(50):
    print("x" * 40)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
print("last")
"""
    with open(tmp_path / "log", "w") as log:
        done = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "first" and lines[-1] == "last" and "bytes of this log were lost: File too large" in lines[-2]
