"""A standby becomes the process that its attempt asks for, or nothing of it is left: small programs, no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import standby as standby_module
from launch.local.parent_guard import MARK_NAME, marked_pids
from launch.standby import WAITS, Standby

ROOT = str(Path(__file__).resolve().parents[2])
# It lives until its supervisor has seen that it has begun, as every torchrun does.
PROCESS = """
import json, os, sys, time
from launch.standby import WAITS, wait_for_attempt
waited = WAITS in os.environ
if waited:
    wait_for_attempt(sys.argv[1], sys.argv[2:])
streams = [os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)]
name = open("/proc/self/comm").read().strip()
liked = int(open("/proc/self/oom_score_adj").read())
print(json.dumps([waited, os.getpid(), sys.argv[1:], os.environ["EARLY"], os.environ["LATE"], streams, liked, name]), flush=True)
while not os.path.exists(sys.argv[1] + ".seen"):
    time.sleep(0.01)
"""
ENVIRON = {**os.environ, "PYTHONPATH": ROOT, "EARLY": "1", "LATE": "no"}


def command(program: Path, word: str) -> list[str]:
    return [sys.executable, "-c", PROCESS, str(program), word]


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Standby]]:
    made: list[Standby] = []

    def start(imports: str) -> Standby:
        (tmp_path / "program.py").write_text(f"print('of an import')\n{imports}")
        made.append(Standby(command(tmp_path / "program.py", "{word}"), ENVIRON))
        return made[-1]

    yield start
    for standby in made:
        standby.kill()


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it didn't come true in time"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "imports", ["", "import threading, time\nthreading.Thread(target=time.sleep, args=[9], daemon=True).start()"]
)
def test_a_standby_becomes_the_process_of_its_attempt(make: Callable[[str], Standby], tmp_path: Path, imports: str) -> None:
    """The thread of an import would not survive the fork of the fork server: then the same process starts anew."""
    standby, log = make(imports), tmp_path / "log"
    log.write_text("before\n")
    wait_until(lambda: standby.is_ready)
    assert oom_score(marked_pids(standby.mark)[0]) == 1000
    late = {**ENVIRON, MARK_NAME: standby.mark, "LATE": "yes"}
    process = standby.begin(command(tmp_path / "program.py", "step 7"), late, log)
    (tmp_path / "program.py.seen").touch()
    assert process is not None and process.wait(30) == 0
    before, after = log.read_text().splitlines()
    streams, name = [os.devnull, str(log), str(log)], Path(sys.executable).resolve().name[:15]
    found = json.loads(after)
    assert found.pop() in (name, "python"), found
    assert before == "before"
    words = [str(tmp_path / "program.py"), "step 7"]
    assert found == [not imports, process.pid, words, "1", "yes", streams, oom_score(os.getpid())]


@pytest.mark.parametrize("what", ["killed", "stopped", "importing"])
def test_an_unusable_standby_is_killed(
    make: Callable[[str], Standby], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(standby_module, "_PATIENCE_S", 600.0)
    standby = make("import time\ntime.sleep(60)" if what == "importing" else "")
    wait_until(lambda: marked_pids(standby.mark) if what == "importing" else standby.is_ready)
    if what != "importing":
        os.kill(marked_pids(standby.mark)[0], signal.SIGKILL if what == "killed" else signal.SIGSTOP)
        wait_until(lambda: not standby.is_ready)
    assert standby.begin(command(tmp_path / "program.py", "word"), ENVIRON, tmp_path / "log") is None
    assert marked_pids(standby.mark) == []


def test_a_standby_ends_with_its_supervisor(tmp_path: Path) -> None:
    """Stopped too: the kernel kills it."""
    (tmp_path / "program.py").write_text("")
    supervisor = f"""
import os, signal, sys, time
from launch.standby import Standby
standby = Standby({command(tmp_path / "program.py", "word")!r}, os.environ)
while not standby.is_ready:
    time.sleep(0.01)
os.kill(standby._process.pid, signal.SIGSTOP)
print(standby.mark, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", supervisor], env=ENVIRON, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL and WAITS not in os.environ
    wait_until(lambda: marked_pids(done.stdout.strip()) == [])
