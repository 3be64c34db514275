"""Catches rank 0 in the moment of a blow. In: how to find it, a `Blow`. Out: the body runs in that moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from pretrain.run.beat import OF_A_STEP, PHASES, READING, Beat
from tests.chaos.plan import TRAINING, Blow
from tests.run.world import beat_of

PATIENCE_S = 300.0
# Polled this often, a phase of some milliseconds is seldom missed.
POLL_S = 0.001
_BEFORE_STEPS = PHASES[: PHASES.index(READING) + 1]


class Missed(Exception):
    """The run was over before the moment came."""


@contextmanager
def caught(find: Callable[[], psutil.Process | None], is_over: Callable[[], bool], blow: Blow, last: int) -> Iterator[Beat]:
    """The body runs when rank 0, which `find` gives, is at the blow's phase, or past it where it was too short to be seen.

    `last`: the run's last step. Raises Missed once `is_over`.
    """
    deadline, rank, first = time.monotonic() + PATIENCE_S, None, 0
    while True:
        assert time.monotonic() < deadline, f"{blow} did not come"
        if rank is None or not rank.is_running():
            if is_over():
                raise Missed
            rank, first = find(), 0
        beat = beat_of(rank) if rank is not None else None
        if rank is None or beat is None:
            time.sleep(0.02)
            continue
        first = first or (beat.step if beat.phase in OF_A_STEP else 0)
        if _has_come(beat, blow, first, last) and (seen := _hold(rank, blow, first, last)) is not None:
            break
        time.sleep(POLL_S)
    if not blow.held:
        rank.resume()
        time.sleep(blow.delay_s)
    try:
        yield seen
    finally:
        if blow.held:
            with suppress(psutil.NoSuchProcess):
                rank.resume()


def _has_come(beat: Beat, blow: Blow, first: int, last: int) -> bool:
    """`first`: the attempt's first step; 0: it has not begun."""
    if blow.phase in _BEFORE_STEPS:
        return PHASES.index(beat.phase) >= PHASES.index(blow.phase)
    if not first:
        return False
    if beat.step >= last and beat.phase == PHASES[-1]:
        return True
    return beat.step >= min(first + blow.steps, last - 2) and blow.phase in (TRAINING, beat.phase)


def _hold(rank: psutil.Process, blow: Blow, first: int, last: int) -> Beat | None:
    """Stop the rank; None: it was gone, or had left the moment, and goes on."""
    with suppress(psutil.NoSuchProcess):
        rank.suspend()
        beat = beat_of(rank)
        if beat is not None and _has_come(beat, blow, first, last):
            return beat
        rank.resume()
    return None
