"""May this version of a library compute a run? In: installed versions. Out: a problem, or none.

Guards and patches are written for the text of the versions that were tested. Another version is refused, unless the variable
PHALANX_UNTESTED is 1. Patch releases of a tested minor version are taken: the private names that guards rely on are asserted.

Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from configs.errors import Notice, Problem
from configs.schema import Config
from parallel.compat.guard import TESTED
from parallel.compat.versions import installed_version, numbers_of

LET_THROUGH = "PHALANX_UNTESTED"
# The libraries whose private names our guards replace, and that decide the numbers of a step.
ENGINES = ("megatron-core", "deepspeed")


def version_problem(library: str, environ: Mapping[str, str] = os.environ) -> Problem | None:
    """The refusal of an untested version of megatron-core or deepspeed. None: it was tested, or is not installed."""
    version, (first, last) = installed_version(library), TESTED[library]
    found = numbers_of(version)
    if not found or environ.get(LET_THROUGH) == "1" or (numbers_of(first) <= found[:3] and found[:2] <= numbers_of(last)[:2]):
        return None
    tested = first if first == last else f"{first} to {last}"
    fix = f"pip install '{library}=={last}'; {LET_THROUGH}=1 lets another version through: rehearse first what it computes"
    return Problem(library, version, f"must be a tested version: {tested}", fix)


def has_own_libraries(config: Config) -> bool:
    """Do the ranks import other libraries than this process, those of a container?"""
    return config.launch.target == "slurm" and config.launch.slurm.container.kind != "none"


def engine_problems(config: Config) -> list[Problem]:
    """The refusals of the engines that a run of this config imports. A container has its own, which its ranks check."""
    if has_own_libraries(config):
        return []
    engines = ENGINES if config.zero.engine == "deepspeed" else ("megatron-core",)
    return [problem for library in engines if (problem := version_problem(library)) is not None]


def changed_versions(before: Mapping[str, str | None]) -> list[Notice]:
    """Notices of libraries that have another version than in `before`, which is provenance.json's "packages"."""
    changed = [
        f"{library} {before[library]} → {installed_version(library)}"
        for library in (*ENGINES, "torch")
        # A login node may have none of them: what the ranks import is not known there.
        if before.get(library) and installed_version(library) not in ("unknown", before[library])
    ]
    if not changed:
        return []
    text = (
        f"libraries changed since the last attempt: {', '.join(changed)}; phalanx rehearse --against compares what they compute"
    )
    return [Notice("versions", text)]
