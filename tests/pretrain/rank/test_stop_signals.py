"""Stop signals: one request, repeats within 5 s count once, a later one ends at once even when the main thread is stuck."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from pretrain.rank.stop_signals import NONE, PREEMPTED, STOPPED, StopSignals

PROGRAM = """
import ctypes, sys, time
from pretrain.rank.stop_signals import StopSignals
signals = StopSignals(at_once=lambda name: print("at once", name, flush=True), repeat_s=float(sys.argv[2])).install()
print("ready", flush=True)
if sys.argv[1] == "stuck":
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
while not signals.requested:
    time.sleep(0.01)
print(signals.state, signals.signal_name, flush=True)
time.sleep(30 if sys.argv[1] == "slow" else 0.3)
"""


def start(kind: str, repeat_s: float = 5.0) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind, str(repeat_s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "state"),
    [
        (signal.SIGINT, "stopped"),
        (signal.SIGTERM, "preempted"),
        (signal.SIGUSR1, "preempted"),
        (signal.SIGHUP, "preempted"),
    ],
)
def test_a_signal_is_a_request(number: signal.Signals, state: str) -> None:
    process = start("quick")
    process.send_signal(number)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == f"{state} {number.name}\n"
    assert err.count("phalanx:") == 1 and "finishing the step and saving" in err


def test_a_later_signal_ends_at_once() -> None:
    process = start("slow", repeat_s=0.2)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "preempted SIGTERM\n"
    time.sleep(0.4)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and out == "at once SIGTERM\n"


def test_at_once_works_while_the_main_thread_is_stuck_in_c() -> None:
    """A collective whose partner is gone never returns to Python; a mutex locked twice stands in."""
    process = start("stuck", repeat_s=0.0)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM) and "at once" in out


def test_levels_are_ordered_for_the_ranks_maximum() -> None:
    assert NONE < STOPPED < PREEMPTED
    signals = StopSignals()
    signals.receive(signal.SIGCHLD, 0.0)
    assert signals.requested == NONE and signals.state == ""
    signals.receive(signal.SIGINT, 1.0)
    signals.receive(signal.SIGTERM, 2.0)
    assert (signals.requested, signals.state, signals.signal_name) == (STOPPED, "stopped", "SIGINT")
