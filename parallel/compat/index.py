"""The index of all patches and guards of libraries: fault -> library and versions -> guard -> symptom -> test.

In: the tables of parallel/compat/faults_*.py. Out: `GUARDS`, and the index as a Markdown table for the documentation.
A test asserts that each guard, each test and each private name of the index exists.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping

from parallel.compat.faults_deepspeed import DEEPSPEED_GUARDS
from parallel.compat.faults_megatron import MEGATRON_GUARDS
from parallel.compat.faults_torch import TORCH_GUARDS
from parallel.compat.guard import TESTED, Guard
from parallel.compat.versions import installed_version

GUARDS: tuple[Guard, ...] = (*MEGATRON_GUARDS, *DEEPSPEED_GUARDS, *TORCH_GUARDS)


def guards_in(module: str) -> list[Guard]:
    """The guards of the index that live in one of our modules."""
    return [guard for guard in GUARDS if guard.module == module]


def needed_guards(versions: Mapping[str, str]) -> tuple[str, ...]:
    """The faults that libraries of these versions have: the guards that are on. An empty version: not installed."""
    return tuple(guard.fault for guard in GUARDS if (version := versions.get(guard.library)) and guard.needed_by(version))


def is_needed(fault: str) -> bool:
    """Does the installed version of the library have this fault of the index?"""
    (guard,) = [guard for guard in GUARDS if guard.fault == fault]
    return guard.needed_by(installed_version(guard.library))


def markdown() -> str:
    """The index as Markdown: one table a library, each row a guard."""
    parts = []
    for library, (first, last) in TESTED.items():
        tested = first if first == last else f"{first} to {last}"
        rows = [_row(guard) for guard in GUARDS if guard.library == library]
        head = "| Fault | Versions | Guard | Without it | Test |\n| --- | --- | --- | --- | --- |"
        parts.append(f"### {library}\n\nTested with {library} {tested}.\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(guard: Guard) -> str:
    first, last = guard.versions
    until = "" if last == first else f" to {last}"
    versions = f"from {first}" if last is None else first + until
    file, _, name = guard.test.partition("::")
    cells = (guard.fault, versions, f"`{guard.guard}`", guard.symptom, f"`{name}` in `{file}`")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
