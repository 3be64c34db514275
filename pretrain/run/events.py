"""The kinds of events in events.jsonl: the fields of each kind, and which process writes it.

The table is a public contract. Writers name a kind by `EventKind`, and `check_event` refuses a kind or a field that is not
in the table. Readers compare with `EventKind`, whose values are the strings in the file. `markdown` renders the table for
the documentation.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

RANK_0 = "rank 0"
SUPERVISOR = "the launcher (local) or the batch step (Slurm)"
BATCH_STEP = "the batch step (Slurm)"
SUBMITTER = "`phalanx launch`, `phalanx resume` or the batch step (Slurm)"
CANCELLER = "the batch step, or `phalanx cancel` (Slurm)"


class EventKind(StrEnum):
    """The value of "kind" in a row of events.jsonl."""

    # An attempt, from rank 0.
    ATTEMPT = "attempt"
    EVENTS_MENDED = "events_mended"
    NO_OUTCOME = "no_outcome"
    RESUMED = "resumed"
    WARM_START = "warm_start"
    TRAINING = "training"
    OUTCOME = "outcome"
    # The record (metrics.jsonl).
    RECORD_MENDED = "record_mended"
    RECORD_GAP = "record_gap"
    RECORD_CUT = "record_cut"
    RECORD_REFUSED = "record_refused"
    RECORD_ACCEPTED = "record_accepted"
    # Checkpoints.
    SAVED = "saved"
    SAVE_FAILED = "save_failed"
    PRUNED = "pruned"
    PRUNE_FAILED = "prune_failed"
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    OPTIMIZER_RESET = "optimizer_reset"
    CHECKPOINT_ROLLED_BACK = "checkpoint_rolled_back"
    # Steps that were not applied.
    SKIPPED_STEP = "skipped_step"
    ROLLED_BACK = "rolled_back"
    WENT_BACK = "went_back"
    DIVERGED = "diverged"
    # What a supervisor sees of the ranks.
    HUNG = "hung"
    STRAGGLER = "straggler"
    # The life of a Slurm job.
    JOB_SUBMITTED = "job_submitted"
    JOB_ATTEMPT = "job_attempt"
    JOB_SIGNAL = "job_signal"
    JOB_ENDED = "job_ended"
    JOB_REQUEUED = "job_requeued"
    JOB_RESTARTED = "job_restarted"
    JOB_OVER = "job_over"


@dataclass(frozen=True)
class EventField:
    """One field of an event. `type` is the JSON type with its unit. An optional field may be absent from a row."""

    name: str
    type: str
    meaning: str
    optional: bool = False


@dataclass(frozen=True)
class EventSpec:
    """What one kind means, which process writes it, and its fields."""

    meaning: str
    writer: str
    fields: tuple[EventField, ...]


COMMON_FIELDS = (
    EventField("time", "number, seconds since the epoch", "when the row was written, by the writer's clock"),
    EventField("attempt", "integer", "the attempt that the row belongs to; 0: no attempt has begun"),
    EventField("kind", "string", "the kind of the event, from this table"),
)

_WHY = EventField("why", "string", "the reason, one line for people")
_STEP = EventField("step", "integer, steps", "the optimizer step")
_FOLDER = EventField("folder", "string", "the name of the checkpoint's folder, for example step_0000100")
_KEPT_AS = EventField("kept_as", "string", "the name that the folder has now; a folder of this name is never loaded")
_CUT_BYTES = EventField("cut_bytes", "integer, bytes", "length of the incomplete last line that was removed")
_NONFINITE = EventField(
    "nonfinite", "object", "values that JSON can't hold: field name to nan, inf or -inf; the field itself is null", True
)
_REFUSED = (
    EventField("loss", "number or null, nats a token", "the loss of the refused step"),
    EventField("grad_norm", "number or null", "the norm of the gradient before clipping"),
    EventField("rule", "string", "the rule that the step broke, with its numbers"),
    _NONFINITE,
)
_REFUSED_STEP = (
    _STEP,
    EventField("samples", "integer, sequences", "samples consumed since the run began, the refused batch included"),
    *_REFUSED,
)
_BLOCKED = EventField("blocked_s", "number, seconds", "how long the training loop waited for the save", True)
_STEP_BEFORE = EventField("step_before", "integer, steps", "the newest complete checkpoint when the attempt began; 0: none")

EVENTS: Mapping[EventKind, EventSpec] = {
    EventKind.ATTEMPT: EventSpec(
        "An attempt has begun: rank 0 holds the run folder.",
        RANK_0,
        (
            EventField("wandb_id", "string", "the id of the W&B run when the attempt began"),
            EventField("logs", "string or null", "the log folder, where a launcher named one"),
            EventField("slurm_job", "string or null", "the Slurm job's number"),
            EventField("resume_step", "integer or null, steps", "checkpoint.resume_step of its config", True),
            EventField("began", "number, seconds since the epoch", "when its launcher, else rank 0's process, began it", True),
        ),
    ),
    EventKind.EVENTS_MENDED: EventSpec("A crash had left an incomplete last line in events.jsonl.", RANK_0, (_CUT_BYTES,)),
    EventKind.NO_OUTCOME: EventSpec(
        "An earlier attempt ended without an outcome: it was killed, or its machine was lost.",
        RANK_0,
        (
            EventField("of_attempt", "integer", "the number of that attempt"),
            EventField("last_sign", "number, seconds since the epoch", "when its heartbeat last touched the lock file", True),
        ),
    ),
    EventKind.RESUMED: EventSpec(
        "The attempt continues from a checkpoint of this run.",
        RANK_0,
        (
            EventField("step", "integer, steps", "the checkpoint's step"),
            EventField("consumed_samples", "integer, sequences", "samples that no later step reads again"),
            EventField("layout", "object", "the parallel degrees that wrote the checkpoint"),
            EventField("engine", "string", "the engine that wrote the checkpoint"),
        ),
    ),
    EventKind.WARM_START: EventSpec(
        "The run begins with the weights of another checkpoint (checkpoint.load).",
        RANK_0,
        (EventField("folder", "string", "the path of that checkpoint"),),
    ),
    EventKind.TRAINING: EventSpec("The start-up is over: the first step of the attempt begins.", RANK_0, (_STEP,)),
    EventKind.OUTCOME: EventSpec(
        "The attempt has ended; outcome.json holds the same.",
        f"{RANK_0}; after a hang, {SUPERVISOR}",
        (
            EventField("state", "string", "finished, stopped, preempted, diverged or failed"),
            _WHY,
            EventField("step", "integer, steps", "the last step that counts"),
            EventField("goodput", "object", "the whole run's time by what it was spent on, in seconds, and the ratio", True),
        ),
    ),
    EventKind.RECORD_MENDED: EventSpec(
        "A crash had left an incomplete last line in metrics.jsonl.",
        RANK_0,
        (_CUT_BYTES,),
    ),
    EventKind.RECORD_GAP: EventSpec(
        "metrics.jsonl lacks rows between two steps.",
        RANK_0,
        (
            EventField("after_step", "integer, steps", "the last step before the gap"),
            EventField("next_step", "integer, steps", "the first step after the gap", True),
            EventField("restored_step", "integer, steps", "the restored step, where the gap reaches up to it", True),
        ),
    ),
    EventKind.RECORD_CUT: EventSpec(
        "Rows past the restored step were removed from metrics.jsonl: their steps are trained again.",
        RANK_0,
        (
            EventField("rows", "integer, rows", "how many rows were removed"),
            EventField("restored_step", "integer, steps", "the last step that stays"),
            EventField("kept_in", "string or null", "the file of this attempt's launch folder that keeps the rows"),
        ),
    ),
    EventKind.RECORD_REFUSED: EventSpec(
        "The disk refuses rows of metrics.jsonl. They wait in memory, training goes on, and no save is complete before they are "
        "written.",
        RANK_0,
        (EventField("after_step", "integer, steps", "the last step whose row is written"), _WHY),
    ),
    EventKind.RECORD_ACCEPTED: EventSpec(
        "The disk takes rows of metrics.jsonl again; those that waited are written.",
        RANK_0,
        (_STEP, EventField("seconds", "number, seconds", "how long rows waited")),
    ),
    EventKind.SAVED: EventSpec(
        "A checkpoint is complete.",
        RANK_0,
        (
            EventField("step", "integer, steps", "the checkpoint's step"),
            _FOLDER,
            EventField("seconds", "number, seconds", "from the start of the save until the loop saw it complete"),
            _BLOCKED,
        ),
    ),
    EventKind.SAVE_FAILED: EventSpec(
        "A save has failed. It left no checkpoint; training continues.",
        RANK_0,
        (_FOLDER, _WHY, _BLOCKED),
    ),
    EventKind.PRUNED: EventSpec("A checkpoint was deleted, as checkpoint.keep demands.", RANK_0, (_FOLDER,)),
    EventKind.PRUNE_FAILED: EventSpec("The disk refused to delete old checkpoints.", RANK_0, (_WHY,)),
    EventKind.CHECKPOINT_DAMAGED: EventSpec(
        "A checkpoint is damaged and was renamed; an older one is tried.",
        RANK_0,
        (_FOLDER, _WHY, _KEPT_AS),
    ),
    EventKind.OPTIMIZER_RESET: EventSpec(
        "The weights of a checkpoint were loaded without its optimizer state, and the optimizer starts afresh.",
        RANK_0,
        (_FOLDER, _WHY),
    ),
    EventKind.CHECKPOINT_ROLLED_BACK: EventSpec(
        "The run went back to a step before this checkpoint, which was renamed.",
        RANK_0,
        (_FOLDER, _KEPT_AS),
    ),
    EventKind.SKIPPED_STEP: EventSpec(
        "A step was not applied, and the run continues with the next batch.",
        RANK_0,
        _REFUSED_STEP,
    ),
    EventKind.ROLLED_BACK: EventSpec(
        "A step was not applied, and the run continues from an earlier checkpoint, past the batches since.",
        RANK_0,
        (
            EventField("from_step", "integer, steps", "the refused step"),
            EventField("to_step", "integer, steps", "the step of the checkpoint"),
            EventField("consumed_samples", "integer, sequences", "samples that no later step reads again"),
            *_REFUSED,
        ),
    ),
    EventKind.WENT_BACK: EventSpec(
        "`checkpoint.resume_step` named an earlier checkpoint, and the run continues from there as another line.",
        RANK_0,
        (
            EventField("from_step", "integer, steps", "the newest complete checkpoint of the line that was left"),
            EventField("to_step", "integer, steps", "the step of the checkpoint that the run continues from"),
            EventField("consumed_samples", "integer, sequences", "samples consumed at that checkpoint"),
            EventField("checkpoints", "list of strings", "folders of the line that was left: they are set aside"),
            EventField("wandb_id", "string", "the id of the W&B run of the new line"),
        ),
    ),
    EventKind.DIVERGED: EventSpec("A step was not applied, and the run ends.", RANK_0, _REFUSED_STEP),
    EventKind.HUNG: EventSpec(
        "The ranks made no progress and were killed.",
        SUPERVISOR,
        (
            _WHY,
            EventField("late", "list of objects", "the ranks that the others wait for: rank, node, step, phase"),
            EventField("nodes", "list of strings", "the nodes of those ranks"),
            EventField("seconds", "number, seconds", "from the last progress of any rank to the verdict", True),
        ),
    ),
    EventKind.STRAGGLER: EventSpec(
        "A node is slower than the others. Written once a node and measure in an attempt.",
        BATCH_STEP,
        (
            EventField("node", "string", "the node's name"),
            EventField("what", "string", "what was measured"),
            EventField("ratio", "number", "how many times slower than the median rank"),
            EventField("ranks", "list of integers", "the slow ranks of the node"),
        ),
    ),
    EventKind.JOB_SUBMITTED: EventSpec(
        "Slurm has accepted one job or a chain of jobs.",
        SUBMITTER,
        (
            EventField("jobs", "list of integers", "the job numbers, in the order of the chain"),
            EventField("script", "string", "the path of the batch script", True),
            EventField("why", "string", "why a job was added to the chain", True),
        ),
    ),
    EventKind.JOB_ATTEMPT: EventSpec(
        "The batch step starts an attempt.",
        BATCH_STEP,
        (
            EventField("nodes", "list of strings", "the nodes that the attempt uses"),
            EventField("logs", "string", "the log folder"),
            EventField("job", "integer", "the Slurm job's number"),
            EventField("restarts", "integer", "how often Slurm has restarted the job"),
            _STEP_BEFORE,
        ),
    ),
    EventKind.JOB_SIGNAL: EventSpec(
        "The ranks were asked to save and end.",
        BATCH_STEP,
        (
            EventField("signal", "string", "the signal that the batch step received, or the reason without a signal"),
            EventField("asked", "string", "what the signal asks for: preempted, time_limit, stopped or terminated"),
        ),
    ),
    EventKind.JOB_ENDED: EventSpec(
        "The attempt of a job has ended.",
        BATCH_STEP,
        (
            EventField("cause", "string", "the cause, one of launch/slurm/lifecycle.py `CAUSES`"),
            _WHY,
            EventField("node", "string", "the node where the failure began; empty: no node is blamed"),
            _STEP_BEFORE,
            EventField("step_after", "integer, steps", "the newest complete checkpoint when it ended"),
            EventField("last_step", "integer, steps", "the last step in metrics.jsonl"),
            EventField("srun_exit_code", "integer", "what srun returned", True),
            EventField("seconds", "number, seconds", "from the start of srun to its end", True),
            EventField("post_mortem", "boolean", "true: the next batch step found the end, its own batch step was lost", True),
        ),
    ),
    EventKind.JOB_REQUEUED: EventSpec(
        "The run waits in Slurm's queue again.",
        BATCH_STEP,
        (_WHY, EventField("exclude", "list of strings", "nodes that the next attempt may not use")),
    ),
    EventKind.JOB_RESTARTED: EventSpec(
        "The next attempt follows at once in the same allocation.",
        BATCH_STEP,
        (
            _WHY,
            EventField("nodes", "list of strings", "the nodes of the next attempt"),
            EventField("unused", "list of strings", "other nodes of the job: spare, lost or failed too often"),
        ),
    ),
    EventKind.JOB_OVER: EventSpec(
        "The run is over: no further attempt follows.",
        CANCELLER,
        (
            EventField("state", "string", "a state of `outcome`, or bad_input or gave_up"),
            EventField("exit_code", "integer", "the exit code of the batch step"),
            _WHY,
        ),
    ),
}


def check_event(kind: EventKind, fields: Mapping[str, Any]) -> None:
    """Assert that the table has this kind, that every field is the kind's, and that no required field is missing."""
    assert isinstance(kind, EventKind), f"{kind!r} is not an EventKind; add it to pretrain/run/events.py"
    known = {field.name: field for field in EVENTS[kind].fields}
    unknown = sorted(fields.keys() - known.keys())
    assert not unknown, f"event {kind} has no fields {unknown}; its fields are {sorted(known)}"
    missing = sorted(name for name, field in known.items() if not field.optional and name not in fields)
    assert not missing, f"event {kind} lacks the fields {missing}"


def markdown() -> str:
    """The contract as Markdown: a table of the fields that every row has, and one table of fields for each kind."""
    parts = ["Every row has these fields:", _field_table(COMMON_FIELDS)]
    for kind, spec in EVENTS.items():
        parts += [f"### `{kind}`", f"{spec.meaning} Written by {spec.writer}.", _field_table(spec.fields)]
    return "\n\n".join(parts) + "\n"


def _field_table(fields: tuple[EventField, ...]) -> str:
    rows = ["| field | type, unit | meaning |", "|---|---|---|"]
    for field in fields:
        optional = " (optional)" if field.optional else ""
        rows.append(f"| `{field.name}`{optional} | {field.type} | {field.meaning} |")
    return "\n".join(rows)
