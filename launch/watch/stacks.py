"""Where hung ranks are. In: their states. Out: each one's main thread, innermost frame first, and all stacks as text.

A rank's own faulthandler answers SIGUSR2 from C, also while its main thread is stuck in a collective. A rank that doesn't
answer (stopped, or deep in the kernel) is read from outside by py-spy, where that is installed.

Torch-free.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from launch.watch.heartbeats import RankState
from launch.watch.processes import catches
from pretrain.run.beat import stack_path

ANSWER_S = 2.0
_POLL_S = 0.05
_PY_SPY_S = 5.0
_FRAMES = 24
# faulthandler: '  File "/x/y.py", line 12 in wait'; py-spy --full-filenames: '    wait (/x/y.py:12)'.
_FAULT_THREAD = re.compile(r"^(?:Current thread|Thread) ", re.MULTILINE)
_FAULT_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_SPY_THREAD = re.compile(r"^Thread ", re.MULTILINE)
_SPY_FRAME = re.compile(r"^    (\S+) \((.*):(\d+)\)$", re.MULTILINE)

# Who waits for other ranks is in one of these (the waiting itself is C, without a frame).
_WAITING_FILES = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/tensor_parallel/mappings.py",
    "megatron/core/distributed/",
    "deepspeed/comm/",
)


def collect_stacks(folder: Path, states: Sequence[RankState], answer_s: float = ANSWER_S) -> tuple[list[RankState], str]:
    """The states with their frames, and every thread of every rank as text. `folder`: the beats'. Takes seconds."""
    answers = _ask(folder, states, answer_s)
    silent = [state for state in states if not answers.get(state.rank) and state.process not in ("zombie", "gone") and state.pid]
    answers |= _spy([state.pid for state in silent], {state.pid: state.rank for state in silent})
    found = [replace(state, frames=main_frames(answers.get(state.rank, ""))) for state in states]
    text = "\n".join(f"=== rank {rank}\n{answer.strip()}\n" for rank, answer in sorted(answers.items()))
    return found, text


def main_frames(text: str) -> tuple[str, ...]:
    """The main thread's frames, innermost first: `all_reduce (torch/distributed/distributed_c10d.py:3012)`."""
    for thread, frame, order in ((_FAULT_THREAD, _FAULT_FRAME, (3, 1, 2)), (_SPY_THREAD, _SPY_FRAME, (1, 2, 3))):
        starts = [match.start() for match in thread.finditer(text)]
        for start, stop in pairwise([*starts, len(text)]):
            frames = [tuple(match[group] for group in order) for match in frame.finditer(text, start, stop)]
            # The main thread alone begins in a module (or runs one by -m); others begin in threading.py or in C.
            if frames and frames[-1][0] in ("<module>", "_run_module_as_main"):
                return tuple(f"{name} ({_short(file)}:{line})" for name, file, line in frames[:_FRAMES])
    return ()


def waits_in(state: RankState) -> str:
    """The collective that the rank waits in; empty: none, or not known."""
    found = ""
    for frame in state.frames:
        name, _, place = frame.partition(" (")
        if not place.startswith(_WAITING_FILES):
            break
        # torch wraps its collectives in a logging `wrapper`.
        found = name if name != "wrapper" else found
    return found


def _short(file: str) -> str:
    """From the package on: site-packages and the folders above ours say nothing."""
    for root in ("site-packages/", "dist-packages/"):
        if root in file:
            return file.rpartition(root)[2]
    return "/".join(file.split("/")[-2:])


def _ask(folder: Path, states: Sequence[RankState], answer_s: float) -> dict[int, str]:
    """What the ranks' faulthandlers wrote, by rank."""
    asked: dict[int, tuple[Path, int]] = {}
    for state in states:
        path = stack_path(folder, state.rank)
        # Without its handler SIGUSR2 would end the process.
        if state.process in ("alive", "uninterruptible") and path.exists() and catches(state.pid, signal.SIGUSR2):
            asked[state.rank] = (path, path.stat().st_size)
            try:
                os.kill(state.pid, signal.SIGUSR2)
            except ProcessLookupError:
                del asked[state.rank]
    deadline = time.monotonic() + answer_s
    answers: dict[int, str] = {}
    while True:
        before, answers = answers, {rank: _read_from(*place) for rank, place in asked.items()}
        # An answer is whole when it grows no more.
        if (all(answers.values()) and answers == before) or time.monotonic() > deadline:
            return {rank: answer for rank, answer in answers.items() if answer}
        time.sleep(_POLL_S)


def _read_from(path: Path, offset: int) -> str:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def _spy(pids: Sequence[int], rank_of: dict[int, int]) -> dict[int, str]:
    """py-spy's view of processes that can't answer; all at once. What py-spy can't read is left out."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return {}
    command = [program, "dump", "--nonblocking", "--full-filenames", "--pid"]
    running = {
        pid: subprocess.Popen([*command, str(pid)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for pid in pids
    }
    answers = {}
    for pid, process in running.items():
        try:
            answers[rank_of[pid]] = process.communicate(timeout=_PY_SPY_S)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {rank: answer for rank, answer in answers.items() if answer}
