"""Collects the stacks of hung ranks. In: the ranks' states. Out: each main thread's frames, innermost first; all stacks as text.

A rank's faulthandler answers SIGUSR2. The handler is C code, so it also answers while the main thread is stuck in a
collective. A stopped rank, or one that sleeps in the kernel, doesn't answer. py-spy reads such a rank from outside, if py-spy
is installed.

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
# A frame of faulthandler: '  File "/x/y.py", line 12 in wait'. A frame of py-spy --full-filenames: '    wait (/x/y.py:12)'.
_FAULT_THREAD = re.compile(r"^(?:Current thread|Thread) ", re.MULTILINE)
_FAULT_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_SPY_THREAD = re.compile(r"^Thread ", re.MULTILINE)
_SPY_FRAME = re.compile(r"^    (\S+) \((.*):(\d+)\)$", re.MULTILINE)

# The innermost Python frame of a rank that waits for other ranks is in one of these files. The C code that waits has no frame.
_WAITING_FILES = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/tensor_parallel/mappings.py",
    "megatron/core/distributed/",
    "deepspeed/comm/",
)


def collect_stacks(folder: Path, states: Sequence[RankState], answer_s: float = ANSWER_S) -> tuple[list[RankState], str]:
    """(the states with their frames, the stacks of all threads of all ranks as text).

    `folder`: the folder of the heartbeats. `answer_s`: how long to wait for the ranks' answers, in seconds. The call takes up
    to `answer_s`, and up to 5 s more for each silent rank that py-spy can't read.
    """
    answers = _ask(folder, states, answer_s)
    silent = [state for state in states if not answers.get(state.rank) and state.process not in ("zombie", "gone") and state.pid]
    answers |= _spy([state.pid for state in silent], {state.pid: state.rank for state in silent})
    found = [replace(state, frames=main_frames(answers.get(state.rank, ""))) for state in states]
    text = "\n".join(f"=== rank {rank}\n{answer.strip()}\n" for rank, answer in sorted(answers.items()))
    return found, text


def main_frames(text: str) -> tuple[str, ...]:
    """The main thread's frames, innermost first, at most 24. `text`: the output of faulthandler or py-spy.

    A frame reads `all_reduce (torch/distributed/distributed_c10d.py:3012)`. Empty: `text` shows no main thread.
    """
    for thread, frame, order in ((_FAULT_THREAD, _FAULT_FRAME, (3, 1, 2)), (_SPY_THREAD, _SPY_FRAME, (1, 2, 3))):
        starts = [match.start() for match in thread.finditer(text)]
        for start, stop in pairwise([*starts, len(text)]):
            frames = [tuple(match[group] for group in order) for match in frame.finditer(text, start, stop)]
            # Only the main thread's outermost frame is a module or `python -m`. Other threads begin in threading.py or in C.
            if frames and frames[-1][0] in ("<module>", "_run_module_as_main"):
                return tuple(f"{name} ({_short(file)}:{line})" for name, file, line in frames[:_FRAMES])
    return ()


def waits_in(state: RankState) -> str:
    """The name of the collective in which the rank waits. Empty: the rank waits in none, or its stack is unknown."""
    found = ""
    for frame in state.frames:
        name, _, place = frame.partition(" (")
        if not place.startswith(_WAITING_FILES):
            break
        # torch wraps its collectives in a function `wrapper` that logs the call.
        found = name if name != "wrapper" else found
    return found


def _short(file: str) -> str:
    """The path from the package folder on, without site-packages. For other files, the last folder and the name."""
    for root in ("site-packages/", "dist-packages/"):
        if root in file:
            return file.rpartition(root)[2]
    return "/".join(file.split("/")[-2:])


def _ask(folder: Path, states: Sequence[RankState], answer_s: float) -> dict[int, str]:
    """Send SIGUSR2 to the ranks and return what their faulthandlers wrote, by rank. Ranks that didn't answer are left out."""
    asked: dict[int, tuple[Path, int]] = {}
    for state in states:
        path = stack_path(folder, state.rank)
        # SIGUSR2 would end a process that has no handler for it.
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
        # An answer counts as complete when it has not grown since the last poll.
        if (all(answers.values()) and answers == before) or time.monotonic() > deadline:
            return {rank: answer for rank, answer in answers.items() if answer}
        time.sleep(_POLL_S)


def _read_from(path: Path, offset: int) -> str:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def _spy(pids: Sequence[int], rank_of: dict[int, int]) -> dict[int, str]:
    """The stacks that py-spy reads from processes that can't answer, by rank. Processes that py-spy can't read are left out.

    All py-spy processes run at the same time.
    """
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
