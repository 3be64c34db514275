"""From a checked config to a job in Slurm's queue. In: config, origin, environment. Out: the script, or job numbers.

What a job will run is written into launch/job_0001 of the run folder first: the script, the config with everything
resolved, and what the batch step must know. Editing the user's file later changes nothing in a waiting job.

Torch-free.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import ConfigError, Problem
from configs.load import Loaded
from configs.schema import Config
from launch.slurm import scheduler
from launch.slurm.job_file import CONFIG_NAME, SCRIPT_NAME, make_job_file
from launch.slurm.lifecycle import OVER, read_lifecycle
from launch.slurm.scheduler import SchedulerError, SlurmJob
from launch.slurm.script import ScriptLocation, job_folder, job_numbers, render
from parallel.batch import steps_of
from parallel.legality.rules import data_size
from parallel.legality.verdict import check_config
from pretrain.run.event_log import append_event
from pretrain.run.events import EventKind
from pretrain.run.files import storage_problem, write_atomically, write_json
from pretrain.run.folder import RunFolder, check_run_folder, folder_of, held_problem, live_holder


@dataclass(frozen=True)
class Submitted:
    """`jobs`: the job and its chain. `estimate`: sbatch's own words on the start."""

    jobs: tuple[int, ...]
    script: Path
    estimate: str


def check_slurm(config: Config) -> list[Problem]:
    """What only a shell can tell: each command of the prologue must be whole by itself."""
    problems = []
    for index, command in enumerate(config.launch.slurm.prologue):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        if done.returncode or done.stderr:
            said = done.stderr.strip().splitlines()
            rule = f"must be a whole shell command by itself; bash says: {said[0] if said else done.returncode}"
            fix = "close the quote or the block; a command of several lines is one entry"
            problems.append(Problem(f"launch.slurm.prologue[{index}]", command, rule, fix))
    return problems


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
    """Slurm may give any number in the range that it is asked for: the range begins at the smallest that trains."""
    if config.launch.slurm.min_nodes is None:
        return config
    return replace(config, launch=replace(config.launch, slurm=replace(config.launch.slurm, min_nodes=sizes[0])))


def submit(loaded: Loaded, cwd: Path) -> Submitted:
    """Write, test and submit. Raises ConfigError: foreign or held folder, a job that is live, or sbatch's refusal.

    A refused job leaves its folder behind for a look at the script, and nothing else.
    """
    config, folder = loaded.config, folder_of(loaded.config)
    if problems := check_run_folder(folder):
        raise ConfigError(problems)
    life = read_lifecycle(folder)
    # Of an attempt whose end is recorded the ranks are on their way out: the new job waits for them.
    if (holder := live_holder(folder)) is not None and not (life.phase == OVER and holder.attempt == life.attempt):
        raise ConfigError(held_problem(folder, holder))
    try:
        if live := [job for job in find_run_jobs(folder) if job.live]:
            raise ConfigError(_live_problem(folder, live[0]))
        place = _write(loaded, folder, cwd)
        script = place.job_dir / SCRIPT_NAME
        estimate = scheduler.test_only(script)
        jobs = [scheduler.submit(script)]
        for _ in range(config.launch.slurm.chain):
            jobs.append(scheduler.submit(script, f"afterany:{jobs[-1]}"))
    except SchedulerError as error:
        fix = "correct launch.slurm to what this cluster has (sinfo, sacctmgr show assoc), or see --dry-run for the script"
        got = config.launch.slurm.partition
        raise ConfigError(Problem("launch.slurm", got, f"Slurm must take the job: {error}", fix)) from error
    try:
        append_event(folder, folder.last_attempt(), EventKind.JOB_SUBMITTED, jobs=jobs, script=str(script))
        write_json(place.job_dir / "submitted.json", {"jobs": jobs, "time": time.time()})
    except OSError as error:
        raise ConfigError(storage_problem("run.dir", folder.path, error)) from error
    return Submitted(tuple(jobs), script, estimate)


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
    lines += [
        f"script   {submitted.script}",
        f"status   phalanx status {folder.path} --watch",
        f"logs     phalanx logs {folder.path} -f",
        f"cancel   phalanx cancel {folder.path}",
    ]
    return "\n".join(lines)


def as_json(submitted: Submitted, folder: RunFolder) -> str:
    document = {"run_dir": str(folder.path), "state": "queued", "jobs": list(submitted.jobs), "script": str(submitted.script)}
    return json.dumps(document, indent=2)
