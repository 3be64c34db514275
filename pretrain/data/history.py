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
from typing import Any, TypeGuard

from configs.errors import ConfigError, Problem
from configs.load import from_yaml_text
from configs.schema import Batch, Config
from parallel.batch import global_batch_at, num_increments, steps_of
from pretrain.run.event_rows import read_events
from pretrain.run.events import EventKind
from pretrain.run.files import iterate_lines
from pretrain.run.folder import RunFolder
from pretrain.run.record import read_rows

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
        first = self.first_sample + (step - self.first_step) * self.batch_seqs
        return replace(self, first_step=step, num_steps=1, first_sample=first)


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
        self._read_events()

    def config_of(self, attempt: int) -> Config:
        """The config of an attempt; 0: of the newest one."""
        if attempt not in self._configs:
            own = self.folder.launch_dir(attempt) / "config.yaml"
            path = own if attempt and own.exists() else self.folder.config
            try:
                self._configs[attempt] = from_yaml_text(path.read_text("utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                rule = f"the config of the run must be readable: {error}"
                raise ConfigError(Problem("RUN_DIR", str(path), rule, "name the folder of a run that has begun")) from error
        return self._configs[attempt]

    def attempt_of(self, step: int) -> int:
        """The attempt that trained a step of the record; 0: the events don't say."""
        place = bisect_right([first for first, _ in self._owners], step) - 1
        return self._owners[place][1] if place >= 0 else 0

    def stretches(self) -> Iterator[Stretch]:
        """The record's steps, ascending. Rows without step and samples are left out."""
        if not self.folder.metrics.exists():
            return iter(())
        return self._joined(read_rows(self.folder.metrics), self._owners, discarded=False)

    def discarded(self) -> Iterator[Stretch]:
        """Steps that were trained and then replaced, oldest first, from the metrics_cut.jsonl of each attempt."""
        lines: dict[int, Iterator[dict[str, Any] | None]] = {}
        for attempt, count, owners in self._cuts:
            path = self.folder.launch_dir(attempt) / "metrics_cut.jsonl"
            if attempt not in lines:
                lines[attempt] = (row for _, row in iterate_lines(path)) if path.exists() else iter(())
            rows = (row for _, row in zip(range(count), lines[attempt]))
            yield from self._joined((row for row in rows if row is not None), owners, discarded=True)

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
            elif kind in (EventKind.ROLLED_BACK, EventKind.WENT_BACK):
                left, to_step = self._owners, event["to_step"]
                self._passed_samples = event["consumed_samples"]
                self._went_back_to = to_step
                self._owners = _pushed(self._owners, to_step + 1, attempt)
            elif kind == EventKind.RECORD_CUT and event["kept_in"]:
                self._cuts.append((attempt, event["rows"], left or self._owners))
                left = None

    def _joined(self, rows: Iterable[dict[str, Any]], owners: list[tuple[int, int]], discarded: bool) -> Iterator[Stretch]:
        """One stretch for each group of rows that continue each other."""
        starts, last = [step for step, _ in owners], None
        for row in rows:
            step, samples = row.get("step"), row.get("samples")
            if not (_is_count(step) and _is_count(samples)):
                continue
            if not discarded and step > self._went_back_to and samples <= self._passed_samples:
                # A kill came between a rollback and the cut of the record: the row belongs to the steps that were left.
                continue
            place = bisect_right(starts, step) - 1
            attempt = owners[place][1] if place >= 0 else 0
            size = _batch_that_ended_at(self.config_of(attempt).batch, samples)
            one = Stretch(step, 1, samples - size, size, attempt, _state(row), discarded)
            if last is not None and _continues(last, one):
                last = replace(last, num_steps=last.num_steps + 1)
                continue
            if last is not None:
                yield last
            last = one
        if last is not None:
            yield last


def _is_count(value: Any) -> TypeGuard[int]:
    """Is the value a count of steps or samples that a run can reach? A damaged or foreign record has others."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST


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
