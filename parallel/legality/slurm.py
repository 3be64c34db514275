"""Rules of a Slurm job: values that fit on a line, names a shell knows, sizes it may go on with. Config in, problems out.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields

from configs.errors import Problem
from configs.schema import Config
from configs.units import seconds_of
from parallel.legality.rules import reads

# Line breaks of any kind and other control characters: the one thing that quoting can't carry in an #SBATCH line.
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")

# Variables that srun and sbatch read as their --export.
_EXPORT_VARIABLES = frozenset({"SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV", "SBATCH_EXPORT"})
# Options of srun that the batch step states, and those that say the same in another way.
_SRUN_SIZE = frozenset({"--nodes", "--ntasks", "--ntasks-per-node", "--tasks-per-node", "--multi-prog"})


@reads("launch")
def slurm_lines(config: Config) -> Iterator[Problem]:
    """Every value of an #SBATCH line is one line without control characters, and extra lines begin with a dash."""
    slurm, container = config.launch.slurm, config.launch.slurm.container
    values: dict[str, object] = {f"launch.slurm.{item.name}": getattr(slurm, item.name) for item in fields(slurm)}
    values |= {f"launch.slurm.container.{item.name}": getattr(container, item.name) for item in fields(container)}
    values |= {"cluster.interface": config.cluster.interface, "run.dir": config.run.dir}
    # A command of the prologue may have several lines.
    del values["launch.slurm.prologue"]
    for path, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and _CONTROL.search(text):
                yield Problem(path, text, "must be one line without control characters", "take the line break out")
    for line in slurm.extra:
        if not line.startswith("-"):
            rule = "is what stands behind #SBATCH, so it begins with - or --"
            yield Problem("launch.slurm.extra", line, rule, f"write --{line.lstrip('-# ') or 'option'}")


@reads("launch")
def srun_arguments(config: Config) -> Iterator[Problem]:
    """launch.slurm.srun_args and launch.env leave the agents' number and steps and the ranks' environment alone."""
    words = config.launch.slurm.srun_args
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        value = value if equals else following
        # srun takes any beginning of an option that no other option shares.
        if len(name) >= len("--exp") and "--export".startswith(name) and value.split(",")[0] != "ALL":
            rule = "must keep the environment of the batch step (ALL first): the ranks need launch.env and what the step sets"
            yield Problem("launch.slurm.srun_args", word, rule, f"write --export=ALL{',' + value if '=' in value else ''}")
        elif any(len(name) >= 5 and option.startswith(name) for option in _SRUN_SIZE) or re.match(r"-[nN]\d*$", word):
            rule = "must not say how many nodes and tasks srun starts: the batch step starts one agent on each node it uses"
            yield Problem("launch.slurm.srun_args", word, rule, "set launch.nodes and launch.processes_per_node")
        elif config.launch.restart.in_place and len(name) >= len("--exclus") and "--exclusive".startswith(name):
            rule = (
                "must not be set with launch.restart.in_place: the next attempt's srun has --overlap, and takes only one of both"
            )
            yield Problem("launch.slurm.srun_args", word, rule, "leave it out: without --overlap, srun's steps are exclusive")
    for name in sorted(_EXPORT_VARIABLES & config.launch.env.keys()):
        rule = "must not be set: srun would keep the environment of the batch step from the ranks"
        yield Problem(f"launch.env.{name}", config.launch.env[name], rule, f"leave {name} out")


@reads("launch.slurm.time", "launch.target")
def slurm_time(config: Config) -> Iterator[Problem]:
    """launch.slurm.time is a time limit that sbatch accepts."""
    time = config.launch.slurm.time
    if time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d{1,2}){0,2}|UNLIMITED|INFINITE", time, re.IGNORECASE):
        rule = "must be a time as sbatch takes it: minutes, HH:MM:SS or D-HH:MM:SS"
        yield Problem("launch.slurm.time", time, rule, "for example launch.slurm.time=1-12:00:00")


@reads("launch")
def time_holds_a_save(config: Config) -> Iterator[Problem]:
    """The time limit is more than twice the time kept for the last save."""
    slurm, limit_s = config.launch.slurm, seconds_of(config.launch.slurm.time)
    if limit_s is not None and limit_s <= 2 * slurm.stop_before_s:
        rule = f"must be more than twice launch.slurm.stop_before_s = {slurm.stop_before_s:g} s, else an attempt hardly trains"
        yield Problem("launch.slurm.time", slurm.time, rule, "set a longer launch.slurm.time, or a smaller stop_before_s")


@reads("launch")
def interface_is_a_name(config: Config) -> Iterator[Problem]:
    """cluster.interface is an interface name or a list that NCCL_SOCKET_IFNAME accepts."""
    interface = config.cluster.interface
    if interface is not None and not re.fullmatch(r"[\w.,:=^@-]+", interface):
        rule = "must be an interface's name, or a list as NCCL_SOCKET_IFNAME takes it"
        yield Problem("cluster.interface", interface, rule, "see `ip link` on a compute node: cluster.interface=eth0")


@reads("launch")
def container_has_an_image(config: Config) -> Iterator[Problem]:
    """A container names its image, and an image names its kind of container."""
    container = config.launch.slurm.container
    if container.kind != "none" and not container.image:
        fix = f"set launch.slurm.container.image, or launch.slurm.container.kind=none instead of {container.kind}"
        yield Problem("launch.slurm.container.image", container.image, f"kind={container.kind} needs an image", fix)
    if container.kind == "none" and container.image:
        rule = "has no effect without launch.slurm.container.kind"
        yield Problem("launch.slurm.container.image", container.image, rule, "set launch.slurm.container.kind=pyxis or apptainer")


@reads("launch")
def fewer_nodes(config: Config) -> Iterator[Problem]:
    """min_nodes is at most launch.nodes."""
    least, nodes = config.launch.slurm.min_nodes, config.launch.nodes
    if least is not None and least > nodes:
        rule = f"must be at most launch.nodes = {nodes}"
        yield Problem("launch.slurm.min_nodes", least, rule, f"set launch.slurm.min_nodes to at most {nodes}")


@reads("launch")
def spare_nodes_are_used(config: Config) -> Iterator[Problem]:
    """Spare nodes take over in a restart in place only."""
    spare = config.launch.slurm.spare_nodes
    if spare and not config.launch.restart.in_place:
        rule = "have no effect without launch.restart.in_place"
        yield Problem("launch.slurm.spare_nodes", spare, rule, "set launch.restart.in_place=true or launch.slurm.spare_nodes=0")


RULES = (
    slurm_lines, srun_arguments, slurm_time, time_holds_a_save, interface_is_a_name, container_has_an_image, fewer_nodes,
    spare_nodes_are_used,
)  # fmt: skip
