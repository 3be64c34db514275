"""Starts the points of a ladder that have not finished. In: a `Ladder`, its configs. Out: an exit code.

Slurm jobs are submitted at once. At most `max_running` of them run at the same time: the points are dealt out to as many
lanes, and each job waits for the one before it in its lane. Local runs follow one another.

Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from configs.errors import ConfigError, Problem
from configs.load import Loaded
from launch.plan import make_plan
from launch.slurm.lifecycle import read_lifecycle
from launch.slurm.submit import submit
from launch.start import check_start, finished_at, start_here
from pretrain.run.folder import RunFolder
from tools.ladder.ladder_file import Ladder, Point, merged, named
from tools.ladder.state import PointState

# A run that was interrupted or preempted ends the ladder's launch: what asked for it meant all of it.
_ENDS_ALL = (75, 130)


class Lanes:
    """Which jobs the next one waits for, so that at most `number` run at the same time."""

    def __init__(self, number: int) -> None:
        self._last: list[list[int]] = [[] for _ in range(number)]
        self._lengths = [0] * number

    def add(self, jobs: Sequence[int], lane: int | None = None) -> None:
        """The jobs come after those of the shortest lane, or of `lane`."""
        lane = self._shortest() if lane is None else lane
        # Jobs that were there before this launch wait for nothing in the lane, so the next job waits for all of them.
        self._last[lane] += jobs
        self._lengths[lane] += 1

    def next(self) -> tuple[int, list[int]]:
        """(the lane of the next job, the jobs that it waits for)."""
        lane = self._shortest()
        waits, self._last[lane] = self._last[lane], []
        return lane, waits

    def _shortest(self) -> int:
        return self._lengths.index(min(self._lengths))


def check_points(loaded: Sequence[tuple[Point, Loaded]], states: Sequence[PointState]) -> list[tuple[Point, Loaded]]:
    """The points that a launch would start: neither finished nor live. Raises ConfigError with the problems of all of them."""
    found, problems = [], []
    for (point, run), state in zip(loaded, states, strict=True):
        if state.status.live or finished_at(run.config) is not None:
            continue
        try:
            check_start(run.config, with_data=True)
        except ConfigError as error:
            problems += named(point, error.problems)
        found.append((point, run))
    targets = sorted({run.config.launch.target for _, run in loaded})
    if len(targets) > 1:
        rule = "the points of a ladder go to one target"
        problems.append(Problem("points: launch.target", targets, rule, "set launch.target in the base"))
    if problems:
        raise ConfigError(merged(problems))
    return found


def submit_points(ladder: Ladder, wanted: Sequence[tuple[Point, Loaded]], states: Sequence[PointState], out: TextIO) -> int:
    """Submit a job for each point. Raises ConfigError at the first one that Slurm refuses; what was submitted stays."""
    lanes = Lanes(ladder.max_running)
    for state in states:
        if state.status.live:
            lanes.add(read_lifecycle(RunFolder(ladder.run_dir(state.point))).jobs)
    for index, (point, run) in enumerate(wanted):
        lane, after = lanes.next()
        try:
            submitted = submit(run, Path.cwd(), after)
        except ConfigError as error:
            raise ConfigError(
                [*named(point, error.problems), _submitted_before(ladder, index, len(wanted))] if index else error.problems
            ) from error
        lanes.add(submitted.jobs, lane)
        print(f"{point.name}: job {', '.join(map(str, submitted.jobs))}" + (f", after {after}" if after else ""), file=out)
    return 0


def _submitted_before(ladder: Ladder, done: int, of: int) -> Problem:
    rule = f"{done} of {of} jobs were submitted before this one was refused"
    return Problem(
        str(ladder.folder), done, rule, "mend what is refused and launch the ladder again: it goes on with what is missing"
    )


def run_points(ladder: Ladder, wanted: Sequence[tuple[Point, Loaded]], out: TextIO) -> int:
    """Run the points here, one after the other. A point that fails does not end the others. Returns the first bad exit code."""
    code = 0
    for index, (point, run) in enumerate(wanted):
        print(f"{point.name}: run {index + 1} of {len(wanted)}", file=out, flush=True)
        plan = make_plan(run.config, ladder.base, ladder.words_of(point), os.environ)
        result = start_here(plan, run.config, out)
        code = code or result.exit_code
        if result.exit_code in _ENDS_ALL:
            return result.exit_code
    return code
