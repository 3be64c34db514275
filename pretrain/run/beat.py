"""A rank's heartbeat as bytes: what it does since when. In: a `Beat`. Out: one fixed-size record, and back.

A rank overwrites its record in place with one write, a watchdog of the same machine reads it at any moment: a record that
was caught half-written fails its checksum and reads as None. pretrain/run/heartbeat.py writes, launch/watch/beats.py reads.

PHALANX_BEAT_DIR   a folder on this machine (in memory, best), made by whoever starts the ranks: rank_N.beat, rank_N.stack

Torch-free.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BEAT_DIR = "PHALANX_BEAT_DIR"
SIZE_BYTES = 512

STARTING = "starting"
BUILDING = "building the model"
RESTORING = "restoring"
READING = "opening the data"
WAITING = "waiting for data"
COMPUTING = "forward and backward"
AGREEING = "agreeing"
VALIDATING = "validating"
RECORDING = "recording"
SAVING = "saving"
ENDING = "ending"

# In the order of a run. A rank behind the others in (rollbacks, step, phase) is the late one.
PHASES = (STARTING, BUILDING, RESTORING, READING, WAITING, COMPUTING, AGREEING, VALIDATING, RECORDING, SAVING, ENDING)
# A step's own phases: their time is known from the steps before, that of the others isn't.
OF_A_STEP = frozenset((WAITING, COMPUTING, AGREEING, RECORDING))


@dataclass(frozen=True)
class Beat:
    """`since_s` is when the phase began, by this machine's monotonic clock. None: not measured yet.

    `start_ticks` tells the process from a later one of the same pid. `rollbacks`: how often the step went back. The three
    times are medians of the last steps.
    """

    rank: int
    pid: int
    start_ticks: int
    phase: str
    step: int
    since_s: float
    rollbacks: int = 0
    step_time_s: float | None = None
    batch_wait_s: float | None = None
    probe_s: float | None = None


def beat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.beat"


def stack_path(folder: Path, rank: int) -> Path:
    """The file into which the rank's faulthandler writes all stacks when the rank receives SIGUSR2."""
    return folder / f"rank_{rank}.stack"


def encode(beat: Beat) -> bytes:
    """SIZE_BYTES bytes: CRC-32 in hex, JSON, spaces, newline. Readable with cat."""
    text = json.dumps(asdict(beat)).encode().ljust(SIZE_BYTES - 10)
    assert len(text) == SIZE_BYTES - 10, f"a beat has room for {SIZE_BYTES - 10} bytes: {text!r}"
    return b"%08x %b\n" % (zlib.crc32(text), text)


def decode(data: bytes) -> Beat | None:
    """The beat in `data`; None when it is incomplete, empty or no beat."""
    if len(data) != SIZE_BYTES or data[:8] != b"%08x" % zlib.crc32(data[9:-1]):
        return None
    value: dict[str, Any] = json.loads(data[9:-1])
    return Beat(**value)
