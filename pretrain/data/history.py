"""Which samples each step of a run has read or will read. In: a run folder, of a run that lives or not. Out: `Stretch`es.

metrics.jsonl has the samples consumed at each step, so rollbacks and skipped steps need no rule of their own. The batch size at
that point follows from the config of the attempt that trained the step, and events.jsonl says which attempt that is. Nothing is
written, and memory depends on the number of stretches and not on the number of steps.

Torch-free.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any, TypeGuard

from configs.errors import ConfigError, Problem
from configs.fields import check_keys
from configs.load import from_yaml_text
from configs.schema import Batch, Config
from parallel.batch import global_batch_at, num_increments, steps_of
from pretrain.run.event_rows import read_events
from pretrain.run.events import EventKind
from pretrain.run.files import iterate_lines, iterate_parts, lines_from_end, parse_line
from pretrain.run.folder import RunFolder
from pretrain.run.record_rows import place_before

# More samples than any run reads, and few enough for int64.
_MOST = 1 << 48
TRAINED, SKIPPED, REFUSED, PLANNED = "trained", "skipped", "refused", "planned"


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps that read consecutive samples in batches of one size.

    `state`: TRAINED, SKIPPED (not applied, the run went on), REFUSED (not applied, the run ended or rolled back) or PLANNED.
    `attempt`: the attempt whose config says how samples are read; 0: the config.yaml of the run folder. `discarded`: the steps
    were trained, and a resume or a rollback has replaced them.
    """

    first_step: int
    num_steps: int
    first_sample: int
    batch_seqs: int
    attempt: int
    state: str
    discarded: bool = False

    @property
    def end_step(self) -> int:
        return self.first_step + self.num_steps

    @property
    def end_sample(self) -> int:
        return self.first_sample + self.num_steps * self.batch_seqs

    def step_of(self, sample: int) -> int:
        """The step that reads a sample of this stretch."""
        return self.first_step + (sample - self.first_sample) // self.batch_seqs

    def at(self, step: int) -> Stretch:
        """The part of the stretch that is one step."""
        return replace(self.after(step - 1), num_steps=1)

    def after(self, step: int) -> Stretch:
        """The part of the stretch behind a step."""
        skipped = step + 1 - self.first_step
        first_sample = self.first_sample + skipped * self.batch_seqs
        return replace(self, first_step=step + 1, num_steps=self.num_steps - skipped, first_sample=first_sample)


class RunHistory:
    """The attempts of a run and what each step read. Raises ConfigError for a folder without a usable config."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._configs: dict[int, Config] = {}
        # (first step, attempt), ascending: which attempt trained a step that the record has.
        self._owners: list[tuple[int, int]] = []
        # Of each batch of rows that was cut out of the record: (attempt whose file keeps it, rows, owners at that time).
        self._cuts: list[tuple[int, int, list[tuple[int, int]]]] = []
        # Samples that no later step reads again.
        self._passed_samples = self._went_back_to = 0
        # The newest step that the events know of.
        self._reached_step = 0
        self._read_events()

    def config_of(self, attempt: int) -> Config:
        """The config of an attempt; 0: of the newest one."""
        if attempt not in self._configs:
            own = self.folder.launch_dir(attempt) / "config.yaml"
            path = own if attempt and own.exists() else self.folder.config
            try:
                config = from_yaml_text(path.read_text("utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                rule = f"the config of the run must be readable: {error}"
                raise ConfigError(Problem("RUN_DIR", str(path), rule, "name the folder of a run that has begun")) from error
            problems = check_keys(config)
            if not config.data.train:
                rule = f"{path} must name the data that the run is trained on"
                problems.append(Problem("data.train", [], rule, "name the folder of a run that has trained"))
            if problems:
                raise ConfigError(problems)
            self._configs[attempt] = config
        return self._configs[attempt]

    def attempt_of(self, step: int) -> int:
        """The attempt that trained a step of the record; 0: the events don't say."""
        return _attempt_at(self._owners, step)

    def stretches(self, first: int = 1, last: int = _MOST) -> Iterator[Stretch]:
        """The record's steps `first` to `last`, ascending, and some beside them: the file is read near these steps only.

        Rows without step and samples are left out, and of a repeated step the first row counts.
        """
        if not self.folder.metrics.exists():
            return iter(())
        parts = iterate_parts(self.folder.metrics, place_before(self.folder.metrics, first))
        found = (stretch for lines in parts for stretch in self._of_lines(lines))
        near = takewhile(lambda stretch: stretch.first_step <= last, _ascending(found))
        return _joined(near)

    def newest(self) -> Stretch | None:
        """The last step of the record. None: it has none."""
        lines = lines_from_end(self.folder.metrics) if self.folder.metrics.exists() else ()
        return next((one for line in lines if (one := self._of_row(parse_line(line), self._owners))), None)

    def lacks(self) -> str | None:
        """What the record lacks of the steps that the run has trained, in words. None: nothing that the events know of."""
        newest = self.newest()
        last = newest.end_step - 1 if newest else 0
        if last >= self._reached_step:
            return None
        return f"metrics.jsonl ends at step {last}, and the run was at step {self._reached_step}: what follows is told as planned"

    def discarded(self) -> Iterator[Stretch]:
        """Steps that were trained and then replaced, oldest first, from the metrics_cut.jsonl of each attempt."""
        lines: dict[int, Iterator[dict[str, Any] | None]] = {}
        for attempt, count, owners in self._cuts:
            path = self.folder.launch_dir(attempt) / "metrics_cut.jsonl"
            if attempt not in lines:
                lines[attempt] = (row for _, row in iterate_lines(path)) if path.exists() else iter(())
            yield from _joined(self._of_row(row, owners, discarded=True) for row in islice(lines[attempt], count))

    def planned(self, after: Stretch | None) -> Iterator[Stretch]:
        """The steps from the record's last stretch to the end of the run, by the newest config."""
        config = self.config_of(0)
        batch, stop = config.batch, steps_of(config)
        step, sample = (after.end_step, after.end_sample) if after else (1, 0)
        sample = max(sample, self._passed_samples)
        while step <= stop and num_increments(batch) and sample < batch.ramp.samples:
            size = global_batch_at(batch, sample)
            yield Stretch(step, 1, sample, size, 0, PLANNED)
            step, sample = step + 1, sample + size
        if step <= stop:
            yield Stretch(step, stop + 1 - step, sample, batch.global_batch_seqs, 0, PLANNED)

    def _read_events(self) -> None:
        left: list[tuple[int, int]] | None = None
        for event in read_events(self.folder):
            kind, attempt = event["kind"], event["attempt"]
            if kind == EventKind.TRAINING:
                self._owners = _pushed(self._owners, event["step"], attempt)
                self._reached_step = event["step"] - 1
            elif kind in (EventKind.ROLLED_BACK, EventKind.WENT_BACK):
                left, to_step = self._owners, event["to_step"]
                self._passed_samples = event["consumed_samples"]
                self._went_back_to = to_step
                self._owners = _pushed(self._owners, to_step + 1, attempt)
                self._reached_step = to_step
            elif kind in (EventKind.SAVED, EventKind.OUTCOME):
                self._reached_step = max(self._reached_step, event["step"])
            elif kind == EventKind.RECORD_CUT and event["kept_in"]:
                self._cuts.append((attempt, event["rows"], left or self._owners))
                left = None

    def _of_lines(self, lines: bytes) -> Iterator[Stretch]:
        """The stretches of complete lines of the record. Most lines are counted and searched, not parsed.

        Lines that look like rows of trained steps are one stretch if step and samples grow from the first line to the last one
        as they do without a gap. Other lines are halved.
        """
        count = lines.count(b"\n")
        first = self._of_row(parse_line(lines[: lines.index(b"\n")]), self._owners)
        if count == 1:
            yield from (first,) if first else ()
            return
        last = self._of_row(parse_line(lines[lines.rindex(b"\n", 0, -1) :]), self._owners)
        if first and last and _continues(whole := replace(first, num_steps=count - 1), last) and _are_trained(whole, lines):
            yield replace(first, num_steps=count)
            return
        half = lines.find(b"\n", len(lines) // 2, -1) + 1 or lines.rindex(b"\n", 0, len(lines) // 2) + 1
        yield from self._of_lines(lines[:half])
        yield from self._of_lines(lines[half:])

    def _of_row(self, row: dict[str, Any] | None, owners: list[tuple[int, int]], discarded: bool = False) -> Stretch | None:
        """The step of a row. None: the row has no step and samples, or it belongs to steps that were left."""
        step, samples = (row.get("step"), row.get("samples")) if row else (None, None)
        if not (row and _is_count(step) and _is_count(samples)):
            return None
        if not discarded and step > self._went_back_to and samples <= self._passed_samples:
            # A kill came between a rollback and the cut of the record.
            return None
        attempt = _attempt_at(owners, step)
        size = _batch_that_ended_at(self.config_of(attempt).batch, samples)
        return Stretch(step, 1, samples - size, size, attempt, _state(row), discarded)


def _ascending(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    """Without steps at or before one that has come already."""
    end = 0
    for one in stretches:
        if one.end_step > end:
            yield one.after(end - 1) if one.first_step < end else one
            end = one.end_step


def _joined(stretches: Iterable[Stretch | None]) -> Iterator[Stretch]:
    """One stretch for each group of stretches that continue each other."""
    last = None
    for one in stretches:
        if one is None:
            continue
        if last is not None and _continues(last, one):
            last = replace(last, num_steps=last.num_steps + one.num_steps)
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


def _are_trained(whole: Stretch, lines: bytes) -> bool:
    """Does each line look like a row of a step that was trained? `whole`: the lines but the last."""
    is_like_rows = lines.count(b'\n{"step": ') == lines.count(b"}\n") - 1 == whole.num_steps and b"\0" not in lines
    return is_like_rows and whole.state == TRAINED and b'"skipped"' not in lines and b'"applied"' not in lines


def _is_count(value: Any) -> TypeGuard[int]:
    """Is the value a count of steps or samples that a run can reach? A damaged or foreign record has others."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST


def _attempt_at(owners: list[tuple[int, int]], step: int) -> int:
    place = bisect_right(owners, step, key=lambda owner: owner[0]) - 1
    return owners[place][1] if place >= 0 else 0


def _pushed(owners: list[tuple[int, int]], step: int, attempt: int) -> list[tuple[int, int]]:
    return [*(owner for owner in owners if owner[0] < step), (step, attempt)]


def _state(row: dict[str, Any]) -> str:
    return SKIPPED if row.get("skipped") else TRAINED if row.get("applied", True) else REFUSED


def _batch_that_ended_at(batch: Batch, consumed_seqs: int) -> int:
    """The size of the global batch after which `consumed_seqs` were consumed. The ramp never falls, so one size fits at most."""
    start, step = batch.ramp.start_seqs or 0, batch.ramp.increment_seqs
    sizes = [batch.global_batch_seqs, *(start + k * step for k in range(num_increments(batch)))]
    fitting = (size for size in sizes if global_batch_at(batch, max(consumed_seqs - size, 0)) == size)
    return min(next(fitting, batch.global_batch_seqs), consumed_seqs)


def _continues(last: Stretch, one: Stretch) -> bool:
    return (
        one.first_step == last.end_step
        and one.first_sample == last.end_sample
        and (one.batch_seqs, one.attempt, one.state) == (last.batch_seqs, last.attempt, last.state)
    )
