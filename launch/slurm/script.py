"""The batch script of a run. In: the config, the run folder, the working folder and Python. Out: the text of the script.

Values reach the script in two ways only: as words quoted for the shell, or in #SBATCH lines. sbatch splits these lines by
the same quoting rules, and the shell takes them for comments. A legality rule in parallel/legality/slurm.py refuses values
with line breaks.

Torch-free.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs import own_packages
from configs.launch_schema import Slurm
from configs.schema import Config
from launch.plan import ALLOCATOR_ALIAS, ALLOCATOR_ENV, program_path, rank_env, start_words
from launch.slurm.job_file import CONFIG_NAME, SCRIPT_NAME
from launch.watch.heartbeats import make_watch_policy
from pretrain.run.folder import RunFolder


@dataclass(frozen=True)
class ScriptLocation:
    """The paths that the script names: the folder of the job, and the submitter's working folder and Python."""

    job_dir: Path
    cwd: Path
    python: str


def job_folder(folder: RunFolder, number: int) -> Path:
    """The folder of one submission, such as launch/job_0001 in the run folder. A submission may have many attempts."""
    return folder.path / "launch" / f"job_{number:04d}"


def job_numbers(folder: RunFolder) -> list[int]:
    """The numbers of a run's submissions, ascending."""
    return sorted(int(path.name.removeprefix("job_")) for path in (folder.path / "launch").glob("job_[0-9]*"))


def render(config: Config, folder: RunFolder, place: ScriptLocation) -> str:
    """The whole batch script of a run."""
    job_dir = place.job_dir.absolute()
    return fill(
        "batch.sh.j2",
        **common_words(config, place),
        script=shlex.quote(str(job_dir / SCRIPT_NAME)),
        sbatch=sbatch_lines(config, folder),
        job_dir=str(job_dir),
        watch=make_watch_policy(config).to_json(),
        config_file=str(job_dir / CONFIG_NAME),
        program=program_path(),
    )


def fill(template: str, **words: Any) -> str:
    """The text of a template with `words` filled in. Raises jinja2.UndefinedError if the template names another word."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # The script is for a shell, not for a browser: every value goes through `quote` instead.
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template(template).render(**words)


def _by_alias(name: str, value: str) -> str:
    """A default as the shell expands it: the allocator's settings may stand under their other name."""
    return f"${{{ALLOCATOR_ALIAS}:-{value}}}" if name == ALLOCATOR_ENV else value


def common_words(config: Config, place: ScriptLocation) -> dict[str, Any]:
    """The template words that all jobs of a config share: the environment, and how the ranks of a node are started."""
    launch, slurm = config.launch, config.launch.slurm
    python, container = slurm.python or place.python, slurm.container
    return {
        "name": config.run.name,
        "nodes": node_range(config),
        "processes_per_node": launch.processes_per_node,
        "modules": slurm.modules,
        "prologue": slurm.prologue,
        "defaults": [(name, _by_alias(name, value), why) for name, value, why in rank_env(config) if name not in launch.env],
        "env": sorted(launch.env.items()),
        "start": start_words(launch.shared_imports),
        "port": launch.master_port,
        "cwd": str(place.cwd.absolute()),
        "python": python,
        "starter": own_packages.STARTER,
        "rank_python": container.python if container.kind != "none" else python,
        "srun": srun_words(slurm),
        "enter": apptainer_words(slurm) if container.kind == "apptainer" else "",
    }


def sbatch_lines(config: Config, folder: RunFolder) -> list[str]:
    """The options of the #SBATCH lines. The user's own options come last, because sbatch takes the last value."""
    slurm = config.launch.slurm
    options = {
        "job-name": config.run.name,
        **placement(config),
        "output": output_pattern(folder.path.absolute() / "logs" / "slurm") + "-%j.out",
        "open-mode": "append",
        # B: sends the signal to the batch step alone. The batch step passes it on. A signal to all would end torchrun.
        "signal": f"B:USR1@{max(1, round(slurm.stop_before_s))}",
        "time": slurm.time,
        "dependency": slurm.dependency,
    }
    # Otherwise Slurm ends a job with the first node that it loses.
    keep = ["--no-kill"] if config.launch.restart.in_place and most_nodes(config) > 1 else []
    return [*option_lines(options), "--requeue" if slurm.requeue else "--no-requeue", *keep, *slurm.extra]


def placement(config: Config) -> dict[str, object]:
    """The sbatch options for the nodes, the resources and the account of a job. None: the config does not say."""
    slurm = config.launch.slurm
    return {
        "nodes": node_range(config),
        "ntasks-per-node": "1",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "gres": slurm.gres,
        "gpus-per-node": slurm.gpus_per_node,
        "mem": slurm.mem,
        "cpus-per-task": slurm.cpus_per_task,
        "nodelist": slurm.nodelist,
        "exclude": slurm.exclude,
        "reservation": slurm.reservation,
    }


def option_lines(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]


def output_pattern(path: Path) -> str:
    """A path for sbatch's --output, with % doubled because a single % begins a pattern."""
    return str(path).replace("%", "%%")


def srun_words(slurm: Slurm) -> list[str]:
    """Further options of srun, quoted for the shell. Since Slurm 22.05, srun does not inherit --cpus-per-task from sbatch."""
    words = []
    if slurm.cpus_per_task is not None:
        words.append(f"--cpus-per-task={slurm.cpus_per_task}")
    container = slurm.container
    if container.kind == "pyxis":
        words.append(f"--container-image={container.image}")
        if container.mounts:
            words.append(f"--container-mounts={','.join(container.mounts)}")
        words += container.args
    return [shlex.quote(word) for word in [*words, *slurm.srun_args]]


def apptainer_words(slurm: Slurm) -> str:
    """The words between srun and the ranks' Python that enter an apptainer image; --nv brings the host's GPU driver in."""
    container = slurm.container
    words = ["apptainer", "exec", "--nv"]
    words += [word for mount in container.mounts for word in ("--bind", mount)]
    return shlex.join([*words, *container.args, str(container.image)])


def most_nodes(config: Config) -> int:
    """The largest number of nodes that a job asks for: those of the run, and the spare ones."""
    return config.launch.nodes + config.launch.slurm.spare_nodes


def node_range(config: Config) -> str:
    """The value of sbatch's --nodes: 4, or 2-4 if the run may go on with fewer nodes."""
    nodes, least = most_nodes(config), config.launch.slurm.min_nodes
    return str(nodes) if least is None or least == nodes else f"{least}-{nodes}"
