"""The record of a rank's heartbeat: the rank's phase, and when it began. In: a `Beat`. Out: SIZE_BYTES bytes, and back.

A rank overwrites its record in place with one write. A watchdog on the same machine may read it at any moment. A record that
was read while half written fails its checksum and decodes to None. pretrain/run/heartbeat.py writes the records,
launch/watch/heartbeats.py reads them.

PHALANX_BEAT_DIR   a folder on this machine, best in memory, that the launcher makes for rank_N.beat and rank_N.stack

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

# In the order of a run. The rank with the smallest (rollbacks, step, phase) is the late one.
PHASES = (STARTING, BUILDING, RESTORING, READING, WAITING, COMPUTING, AGREEING, VALIDATING, RECORDING, SAVING, ENDING)
# The phases of a step. Earlier steps tell how long they take; the duration of the other phases is unknown.
OF_A_STEP = frozenset((WAITING, COMPUTING, AGREEING, RECORDING))


@dataclass(frozen=True)
class Beat:
    """What a rank is doing.

    `since_s`: when the phase began, in seconds of this machine's monotonic clock. `start_ticks` distinguishes the process from
    a later one with the same pid. `rollbacks`: how often the run returned to an earlier step. `step_time_s`, `batch_wait_s`
    and `probe_s` are medians over the last steps, in seconds; None: not measured yet.
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
    """The file of a rank's heartbeat."""
    return folder / f"rank_{rank}.beat"


def stack_path(folder: Path, rank: int) -> Path:
    """The file into which the rank's faulthandler writes all stacks when the rank receives SIGUSR2."""
    return folder / f"rank_{rank}.stack"


def encode(beat: Beat) -> bytes:
    """The beat as SIZE_BYTES bytes of text: CRC-32 in hex, JSON, spaces, newline."""
    text = json.dumps(asdict(beat)).encode().ljust(SIZE_BYTES - 10)
    assert len(text) == SIZE_BYTES - 10, f"a beat has room for {SIZE_BYTES - 10} bytes: {text!r}"
    return b"%08x %b\n" % (zlib.crc32(text), text)


def decode(data: bytes) -> Beat | None:
    """The beat in `data`. None: `data` has another size, or its checksum is wrong."""
    if len(data) != SIZE_BYTES or data[:8] != b"%08x" % zlib.crc32(data[9:-1]):
        return None
    value: dict[str, Any] = json.loads(data[9:-1])
    return Beat(**value)
