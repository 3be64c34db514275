"""Rules of the run: batch, steps, schedule, checkpoints, metrics, launch. Config in, problems out.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from configs.errors import Problem
from configs.keys import all_keys, nearest
from configs.schema import Config
from parallel.batch import deciding_batches, horizon_steps
from parallel.layout import world_size
from parallel.legality.layout import DEGREES, WORLD
from parallel.legality.rules import data_size, near_multiples, on_gpu, reads

# run.name is a part of longer names, like phalanx_NAME_0123456789abcdef.
_NAME_BYTES = 128
# The longest name of a file on Linux, NAME_MAX of <limits.h>.
_PART_BYTES = 255


@reads("batch.ramp", "batch.global_batch_seqs")
def ramp_reaches_batch(config: Config) -> Iterator[Problem]:
    """The batch ramp starts below the global batch, reaches it in whole increments, and has a length."""
    batch, ramp = config.batch, config.batch.ramp
    if ramp.start_seqs is None:
        if ramp.samples:
            rule = "has no effect without batch.ramp.start_seqs"
            yield Problem("batch.ramp.samples", ramp.samples, rule, "set batch.ramp.start_seqs, or samples=0")
        return
    growth = batch.global_batch_seqs - ramp.start_seqs
    if growth <= 0:
        rule = f"must be less than batch.global_batch_seqs = {batch.global_batch_seqs}"
        yield Problem("batch.ramp.start_seqs", ramp.start_seqs, rule, "lower it, or set it to null for no ramp")
    elif growth % ramp.increment_seqs:
        rule = f"must divide the growth of {batch.global_batch_seqs} - {ramp.start_seqs} = {growth} sequences"
        fix = f"set batch.ramp.increment_seqs to a divisor of {growth}"
        yield Problem("batch.ramp.increment_seqs", ramp.increment_seqs, rule, fix)
    if ramp.samples < 1:
        rule = "must be at least 1: the sequences over which the batch grows"
        yield Problem("batch.ramp.samples", ramp.samples, rule, "set batch.ramp.samples")


@reads("batch", *DEGREES, *WORLD)
def batch_divides(config: Config) -> Iterator[Problem]:
    """Every global batch of the run is a multiple of micro_batch_seqs x data parallel ranks."""
    batch, data = config.batch, data_size(config)
    if data is None:
        return
    at_once = batch.micro_batch_seqs * data
    what = f"batch.micro_batch_seqs x data parallel ranks = {batch.micro_batch_seqs} x {data} = {at_once}"
    if batch.global_batch_seqs % at_once:
        fix = f"set batch.global_batch_seqs to {near_multiples(batch.global_batch_seqs, at_once)}"
        yield Problem("batch.global_batch_seqs", batch.global_batch_seqs, f"must be a multiple of {what}", fix)
        return
    uneven = [size for size in deciding_batches(batch) if size % at_once]
    if uneven:
        rule = f"every batch of the ramp must be a multiple of {what}; {uneven[0]} is not"
        fix = f"make batch.ramp.start_seqs and increment_seqs multiples of {at_once}"
        yield Problem("batch.ramp.start_seqs", batch.ramp.start_seqs, rule, fix)


@reads("run.steps", "run.tokens")
def run_has_one_end(config: Config) -> Iterator[Problem]:
    """Exactly one of run.steps and run.tokens is set."""
    steps, tokens = config.run.steps, config.run.tokens
    if steps is None and tokens is None:
        yield Problem("run.steps", None, "a run needs an end: steps or tokens", "set run.steps, or run.tokens")
    if steps is not None and tokens is not None:
        rule = f"a run has one end: run.steps = {steps} is set too"
        yield Problem("run.tokens", tokens, rule, "set one of them to null")


@reads("schedule", "run", "batch", "optimizer.lr")
def schedule_fits_horizon(config: Config) -> Iterator[Problem]:
    """min_lr is at most lr, and warm-up and decay fit into the horizon of the schedule."""
    schedule = config.schedule
    if schedule.min_lr > config.optimizer.lr:
        rule = f"must be at most optimizer.lr = {config.optimizer.lr:g}"
        yield Problem("schedule.min_lr", schedule.min_lr, rule, "lower it")
    no_end = config.run.steps is None and config.run.tokens is None
    if schedule.kind == "constant" or (schedule.horizon_steps is None and no_end):
        return
    horizon = horizon_steps(config)
    where = "schedule.horizon_steps" if schedule.horizon_steps else "the run's steps"
    if schedule.warmup_steps >= horizon:
        rule = f"must be less than the horizon of {horizon} steps ({where})"
        yield Problem("schedule.warmup_steps", schedule.warmup_steps, rule, "shorten the warm-up, or set schedule.horizon_steps")
        return
    decay = schedule.decay_steps
    if schedule.kind == "wsd" and decay is not None and schedule.warmup_steps + decay > horizon:
        rule = f"with warmup_steps = {schedule.warmup_steps} must fit into the horizon of {horizon} steps ({where})"
        yield Problem("schedule.decay_steps", decay, rule, f"set schedule.decay_steps={horizon - schedule.warmup_steps} or less")


@reads("checkpoint", "launch.watch")
def checkpoint_keys(config: Config) -> Iterator[Problem]:
    """load excludes resume_step, milestones are multiples of the save interval, allow_change names keys of the config, and
    commands after a save end before the watchdog takes the end of the run for a hang.
    """
    checkpoint = config.checkpoint
    if checkpoint.load is not None and checkpoint.resume_step is not None:
        rule = "starts from other weights at step 0, while checkpoint.resume_step goes on with this run"
        yield Problem("checkpoint.load", checkpoint.load, rule, "set one of them to null")
    milestone, interval = checkpoint.milestone_interval_steps, checkpoint.interval_steps
    if milestone is not None and (interval is None or milestone % interval):
        rule = f"only saved checkpoints can be kept: must be a multiple of checkpoint.interval_steps = {interval}"
        fix = f"set it to {near_multiples(milestone, interval)}" if interval else "set checkpoint.interval_steps"
        yield Problem("checkpoint.milestone_interval_steps", milestone, rule, fix)
    patience_s = config.launch.watch.start_timeout_s
    if checkpoint.after_save and patience_s and checkpoint.after_save_timeout_s >= patience_s:
        rule = f"must be less than launch.watch.start_timeout_s = {patience_s:g}, after which the end of the run counts as hung"
        fix = f"set it below {patience_s:g}, or launch.watch.start_timeout_s higher"
        yield Problem("checkpoint.after_save_timeout_s", checkpoint.after_save_timeout_s, rule, fix)
    for name in checkpoint.allow_change:
        if name not in all_keys():
            close = nearest(name)
            fix = f"did you mean {close}?" if close else "name keys like optimizer.lr, or sections like data"
            yield Problem("checkpoint.allow_change", name, "must be keys or sections of the config", fix)


@reads("divergence", "checkpoint.interval_steps", "checkpoint.keep")
def divergence_keys(config: Config) -> Iterator[Problem]:
    """The spike rule has enough losses, and a rollback has a checkpoint to go back to."""
    section, checkpoint = config.divergence, config.checkpoint
    if section.spike_min_steps > section.spike_window_steps:
        rule = f"must be at most divergence.spike_window_steps = {section.spike_window_steps}: no more losses are kept"
        yield Problem(
            "divergence.spike_min_steps", section.spike_min_steps, rule, f"set it to {section.spike_window_steps} or less"
        )
    for name, action in (("nonfinite", section.nonfinite), ("spike", section.spike)):
        if action == "rollback" and checkpoint.interval_steps is None:
            rule = "goes back to a checkpoint: checkpoint.interval_steps must be set"
            yield Problem(f"divergence.{name}", action, rule, f"set checkpoint.interval_steps, or divergence.{name}=skip")
    back, keep = section.rollback_checkpoints, checkpoint.keep
    if "rollback" in (section.nonfinite, section.spike) and keep and back > keep:
        rule = f"only the newest checkpoint.keep = {keep} checkpoints are there to go back to"
        fix = f"set divergence.rollback_checkpoints={keep} or less, or checkpoint.keep={back} or more"
        yield Problem("divergence.rollback_checkpoints", back, rule, fix)


@reads("metrics", "cluster", *WORLD)
def profile_keys(config: Config) -> Iterator[Problem]:
    """Profiled ranks exist, and a memory snapshot has a GPU and a profile."""
    profile, world = config.metrics.profile, world_size(config)
    outside = [rank for rank in profile.ranks if rank >= world]
    if outside:
        rule = f"ranks count from 0 to {world - 1}"
        yield Problem("metrics.profile.ranks", profile.ranks, rule, f"leave out {', '.join(map(str, outside))}")
    if profile.memory_snapshot and (profile.start_step is None or config.cluster.device == "cpu"):
        rule = "needs a GPU and metrics.profile.start_step"
        yield Problem("metrics.profile.memory_snapshot", True, rule, "set metrics.profile.start_step, or memory_snapshot=false")


@reads("metrics.sinks")
def sinks_once(config: Config) -> Iterator[Problem]:
    """metrics.sinks names each sink once."""
    sinks = config.metrics.sinks
    if len(set(sinks)) < len(sinks):
        yield Problem("metrics.sinks", sinks, "each sink once", f"set metrics.sinks=[{', '.join(dict.fromkeys(sinks))}]")


@reads("launch.processes_per_node", "cluster")
def ranks_have_gpus(config: Config) -> Iterator[Problem]:
    """Every rank has a GPU of its own."""
    processes, gpus = config.launch.processes_per_node, config.cluster.gpus_per_node
    if on_gpu(config) and processes > gpus:
        rule = f"a rank has a GPU of its own: must be at most cluster.gpus_per_node = {gpus}"
        fix = f"set launch.processes_per_node={gpus}, or cluster.gpus_per_node to what a node has"
        yield Problem("launch.processes_per_node", processes, rule, fix)


@reads("cluster")
def scaleup_domain(config: Config) -> Iterator[Problem]:
    """The scale-up domain is a multiple or a divisor of the GPUs of a node."""
    domain, gpus = config.cluster.scaleup_gpus, config.cluster.gpus_per_node
    if domain is not None and domain % gpus and gpus % domain:
        rule = f"must be a multiple or a divisor of cluster.gpus_per_node = {gpus}"
        yield Problem("cluster.scaleup_gpus", domain, rule, f"set it to {near_multiples(domain, gpus)}")


@reads("run.name", "run.dir")
def run_has_a_folder(config: Config) -> Iterator[Problem]:
    """run.name can name a folder, a job and an option's value; run.dir is short enough for the files in it."""
    name, folder = config.run.name, config.run.dir or ""
    if not re.fullmatch(r"[\w.+][\w.+-]*", name) or set(name) <= {"."}:
        rule = "is a folder's and a job's name: letters, digits and . _ + - only, and no - at its beginning"
        yield Problem("run.name", name, rule, "rename it; run.dir can be any path")
    if (length := len(name.encode())) > _NAME_BYTES:
        rule = f"has {length} bytes, must have at most {_NAME_BYTES}: it is a part of longer file names, which may have 255"
        yield Problem("run.name", name, rule, "shorten it")
    if (length := max(len(part.encode()) for part in folder.split("/"))) > _PART_BYTES:
        rule = f"a part of the path has {length} bytes; file systems take at most {_PART_BYTES}"
        yield Problem("run.dir", folder, rule, "shorten it")


@reads("data.train", "data.valid")
def parts_have_paths(config: Config) -> Iterator[Problem]:
    """Every part of the training and validation data names its files."""
    for name in ("train", "valid"):
        for index, part in enumerate(getattr(config.data, name)):
            if not part.path:
                rule = "each part names the prefix of its PREFIX.bin and PREFIX.idx"
                yield Problem(f"data.{name}[{index}].path", part.path, rule, f"set data.{name}=[{{path: PREFIX}}]")


RULES = (
    ramp_reaches_batch,
    batch_divides,
    run_has_one_end,
    schedule_fits_horizon,
    checkpoint_keys,
    divergence_keys,
    profile_keys,
    sinks_once,
    ranks_have_gpus,
    scaleup_domain,
    run_has_a_folder,
    parts_have_paths,
)
