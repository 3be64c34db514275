"""Waits for a disk that refuses what the next attempt needs. In: what to write. Out: its result, or the disk's last word.

Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from configs.errors import DiskError

POLL_S = 0.5
# How long a launcher waits for a full or lost file system, in seconds. Someone may clear it meanwhile.
PATIENCE_S = 600.0

T = TypeVar("T")


def wait_for_disk(
    work: Callable[[], T], what: str, say: Callable[[str], None], is_asked: Callable[[], bool] = lambda: False
) -> T:
    """The result of `work`, tried again for PATIENCE_S while a disk refuses it. `say` gets a line for each new reason.

    `is_asked`: whether the launcher is asked to end. Raises OSError or DiskError after that time, and when it is asked.
    """
    deadline, said = time.monotonic() + PATIENCE_S, ""
    while True:
        try:
            return work()
        except (OSError, DiskError) as error:
            if time.monotonic() > deadline or is_asked():
                raise
            reason = error.problems[0].rule if isinstance(error, DiskError) else str(error)
            if reason != said:
                said = reason
                say(f"{what} waits until the disk takes it, {PATIENCE_S / 60:g} minutes at most: {said}")
        time.sleep(POLL_S)
