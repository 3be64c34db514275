"""Submits a checked config to Slurm. In: config, origin of its values, environment. Out: the script, or job ids.

Everything that a job will run is first written into launch/job_0001 of the run folder: the script, the resolved config, and
the settings of the batch step. Later changes of the user's file do not affect a waiting job.

Torch-free.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from configs.errors import ConfigError, Problem
from configs.load import Loaded
from configs.schema import Config
from launch.launch_lock import launch_lock
from launch.slurm import node_states, scheduler
from launch.slurm.environment import describe_removed, overruling_variables, submission_environment
from launch.slurm.job_file import CONFIG_NAME, PLACEHOLDERS, SCRIPT_NAME, make_job_file
from launch.slurm.lifecycle import OVER, read_lifecycle
from launch.slurm.scheduler import SchedulerError, SlurmJob
from launch.slurm.script import ScriptLocation, job_folder, job_numbers, render
from parallel.batch import steps_of
from parallel.legality.rules import data_size
from parallel.legality.verdict import check_config
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.files import storage_problem, write_atomically, write_json
from pretrain.run.folder import RunFolder, check_run_folder, folder_of
from pretrain.run.lock import held_problem, live_holder


@dataclass(frozen=True)
class Submitted:
    """`jobs` are the job and its chain. `estimate` is sbatch's estimate of the start. `notes` are about the environment."""

    jobs: tuple[int, ...]
    script: Path
    estimate: str
    notes: tuple[str, ...] = ()


# A submission takes seconds, and longer with a slow controller.
SUBMISSION_PATIENCE_S = 30.0


def check_slurm(config: Config) -> list[Problem]:
    """Problems of the run folder's absolute path, and of the prologue: each command of it must be complete by itself."""
    problems = _path_problems(folder_of(config).path.absolute())
    for index, command in enumerate(config.launch.slurm.prologue):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        if done.returncode or done.stderr:
            said = done.stderr.strip().splitlines()
            rule = f"must be a whole shell command by itself; bash says: {said[0] if said else done.returncode}"
            fix = "close the quote or the block; a command of several lines is one entry"
            problems.append(Problem(f"launch.slurm.prologue[{index}]", command, rule, fix))
    return problems


def _path_problems(path: Path) -> list[Problem]:
    """What neither sbatch nor the batch step can carry in the run folder's absolute path."""
    rules = []
    if "\\" in str(path):
        rules.append("sbatch takes no backslash in the path of a job's output, which lies in the run folder")
    if found := [name for name in PLACEHOLDERS if name in str(path)]:
        rules.append(f"the batch script puts values in the place of {', '.join(PLACEHOLDERS)}; the path holds {found[0]}")
    return [Problem("run.dir", str(path), rule, "choose another run.dir, or another working folder") for rule in rules]


def sizes_of(config: Config) -> list[int]:
    """The numbers of nodes, ascending, that the layout and the batch allow from launch.slurm.min_nodes to launch.nodes."""
    nodes, least = config.launch.nodes, config.launch.slurm.min_nodes
    smaller = (_with_nodes(config, size) for size in range(least or nodes, nodes))
    # First what costs microseconds: most sizes already fail to hold the layout.
    fitting = (made for made in smaller if data_size(made) is not None and not check_config(made).problems)
    return [*(made.launch.nodes for made in fitting), nodes]


def _with_nodes(config: Config, nodes: int) -> Config:
    return replace(config, launch=replace(config.launch, nodes=nodes, slurm=replace(config.launch.slurm, min_nodes=None)))


def script_of(config: Config, cwd: Path) -> str:
    """The batch script of the next submission. Writes nothing."""
    return render(_asking_for(config, sizes_of(config)), folder_of(config), _place(config, cwd))


def _asking_for(config: Config, sizes: list[int]) -> Config:
    """Slurm may give any number of nodes in the requested range, so the range begins at the smallest legal number."""
    if config.launch.slurm.min_nodes is None:
        return config
    return replace(config, launch=replace(config.launch, slurm=replace(config.launch.slurm, min_nodes=sizes[0])))


def submit(loaded: Loaded, cwd: Path, after: Sequence[int] = ()) -> Submitted:
    """Write the job's files and submit it. The job waits until the jobs `after` have ended, however they ended.

    Raises ConfigError if the folder is foreign or held, a job of it is live, or sbatch refuses. A refused job leaves its
    folder behind, where its script can be read, and nothing else.
    """
    folder = folder_of(loaded.config)
    if problems := check_run_folder(folder):
        raise ConfigError(problems)
    # Submissions into one run folder happen one after the other, so that the second one sees the first one's job.
    with launch_lock(folder, SUBMISSION_PATIENCE_S):
        return _submit_alone(loaded, folder, cwd, after)


def _submit_alone(loaded: Loaded, folder: RunFolder, cwd: Path, after: Sequence[int]) -> Submitted:
    config, life = loaded.config, read_lifecycle(folder)
    try:
        if live := [job for job in find_run_jobs(folder) if job.live]:
            raise ConfigError(_live_problem(folder, live[0]))
        # The ranks of an attempt whose job has ended are dead or about to exit: the new job waits until their lock is free.
        if (holder := live_holder(folder)) is not None and not (life.jobs and holder.attempt == life.attempt):
            raise ConfigError(held_problem(folder, holder))
        place = _write(loaded, folder, cwd)
        script = place.job_dir / SCRIPT_NAME
        unset = overruling_variables(os.environ, stated_keys(config))
        estimate = _estimate(script, config)
        jobs = [scheduler.submit(script, _after(after), unset=unset)]
        for _ in range(config.launch.slurm.chain):
            jobs.append(scheduler.submit(script, _after(jobs[-1:]), unset=unset))
    except SchedulerError as error:
        fix = "correct launch.slurm to what this cluster has (sinfo, sacctmgr show assoc), or see --dry-run for the script"
        got = config.launch.slurm.partition
        raise ConfigError(Problem("launch.slurm", got, f"Slurm must take the job: {error}", fix)) from error
    try:
        append_event(folder, folder.last_attempt(), EventKind.JOB_SUBMITTED, jobs=jobs, script=str(script))
        write_json(place.job_dir / "submitted.json", {"jobs": jobs, "time": time.time()})
    except OSError as error:
        raise ConfigError(storage_problem("run.dir", folder.path, error)) from error
    return Submitted(tuple(jobs), script, estimate, environment_notes(config, os.environ))


def _after(jobs: Sequence[int]) -> str | None:
    """sbatch's dependency of a job that waits for these."""
    return ":".join(["afterany", *map(str, jobs)]) if jobs else None


def _estimate(script: Path, config: Config) -> str:
    """sbatch's estimate of the start, or why there is none. Raises SchedulerError if the partition never has enough nodes.

    sbatch would queue such a job for ever where a site does not enforce its limits. A job that waits for drained nodes is
    another matter.
    """
    try:
        return scheduler.test_only(script)
    except SchedulerError as error:
        if 0 < node_states.partition_size(config.launch.slurm.partition) < sizes_of(config)[0]:
            raise
        said = str(error).splitlines()[-1].removeprefix("allocation failure: ")
        return f"it cannot start at present (sbatch --test-only: {said}); it waits in the queue"


def stated_keys(config: Config) -> list[str]:
    """The keys of launch.slurm that have a value."""
    return [item.name for item in fields(config.launch.slurm) if getattr(config.launch.slurm, item.name) is not None]


def environment_notes(config: Config, environ: Mapping[str, str]) -> tuple[str, ...]:
    """What of the submitter's environment does not reach the job, one line each."""
    overruled = overruling_variables(environ, stated_keys(config))
    line = f"{', '.join(overruled)}: not passed to sbatch, where it would win over the config" if overruled else ""
    return tuple(filter(None, (describe_removed(submission_environment(environ)), line)))


def _place(config: Config, cwd: Path) -> ScriptLocation:
    folder = folder_of(config)
    number = max([0, *job_numbers(folder)]) + 1
    return ScriptLocation((cwd / job_folder(folder, number)).absolute(), cwd, sys.executable)


def _write(loaded: Loaded, folder: RunFolder, cwd: Path) -> ScriptLocation:
    config, place = loaded.config, _place(loaded.config, cwd)
    sizes = sizes_of(config)
    config = _asking_for(config, sizes)
    try:
        place.job_dir.mkdir(parents=True)
        (folder.path / "logs").mkdir(exist_ok=True)
        write_atomically(place.job_dir / CONFIG_NAME, loaded.text)
        write_json(place.job_dir / "origin.json", loaded.origin)
        make_job_file(config, (cwd / folder.path).absolute(), steps_of(config), sizes).write(place.job_dir)
        write_atomically(place.job_dir / SCRIPT_NAME, render(config, folder, place))
    except OSError as error:
        raise ConfigError(storage_problem("run.dir", folder.path, error)) from error
    return place


def find_run_jobs(folder: RunFolder) -> list[SlurmJob]:
    """The jobs of the run's last submission that Slurm knows, unless the run is over. Raises SchedulerError."""
    life = read_lifecycle(folder)
    if life.phase == OVER or not life.jobs:
        return []
    return list(scheduler.find_jobs(life.jobs).values())


def _live_problem(folder: RunFolder, job: SlurmJob) -> Problem:
    rule = f"one job at a time trains in a run folder; job {job.number} is {job.state.lower()}"
    return Problem("run.dir", str(folder.path), rule, f"wait for it, or end it: phalanx cancel {folder.path}")


def describe(submitted: Submitted, folder: RunFolder) -> str:
    """What was done and what to type next."""
    first, *chain = submitted.jobs
    lines = [f"submitted job {first}" + (f", then {', '.join(map(str, chain))} as its chain" if chain else "")]
    if submitted.estimate:
        lines.append(submitted.estimate)
    lines += [f"note     {note}" for note in submitted.notes]
    lines += [
        f"script   {submitted.script}",
        f"status   phalanx status {folder.path} --watch",
        f"logs     phalanx logs {folder.path} -f",
        f"report   phalanx report {folder.path}",
        f"cancel   phalanx cancel {folder.path}",
    ]
    return "\n".join(lines)


def as_json(submitted: Submitted, folder: RunFolder) -> str:
    document = {"run_dir": str(folder.path), "state": "queued", "jobs": list(submitted.jobs), "script": str(submitted.script)}
    return json.dumps(document, indent=2)
