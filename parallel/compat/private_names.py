"""Private names of libraries that our guards replace or rely on: each is asserted to exist before it is used.

In: the index of guards. Out: nothing, or a ConfigError that names library, installed version, tested versions and the
symptom. A library that renames a private name would otherwise fail with an AttributeError in the middle of a run, or
leave a guard without effect. The check imports nothing: it looks at modules that its caller has imported already.

Torch-free.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, ModuleType, TracebackType
from typing import Any

from configs.errors import ConfigError, Problem
from parallel.compat.guard import TESTED, Guard
from parallel.compat.index import guards_in
from parallel.compat.versions import installed_version


def require_names(module: str) -> None:
    """Assert the private names of every guard that lives in `module`, which has imported the libraries that it needs.

    Raises ConfigError with one problem for each name that is missing.
    """
    needed = [guard for guard in guards_in(module) if guard.needed_by(installed_version(guard.library))]
    problems = [_problem(guard, f"has no {name}") for guard in needed for name in guard.names if not is_present(name)]
    if problems:
        raise ConfigError(problems)


def is_present(name: str) -> bool:
    """Is `package.module:Class.attribute` there? `Class#attribute` is one that a method of the class sets on its instances."""
    module_name, _, path = name.partition(":")
    path, _, instance_attribute = path.partition("#")
    found: Any = sys.modules.get(module_name)
    if found is None:
        return False
    for part in path.split("."):
        # Not hasattr: a module's own __getattr__ may probe compilers.
        if part not in vars(found) and (isinstance(found, ModuleType) or not hasattr(found, part)):
            return False
        found = getattr(found, part)
    return not instance_attribute or any(instance_attribute in code.co_names for code in _codes_of(found))


def _codes_of(kind: type) -> Iterator[CodeType]:
    """The compiled methods of a class and of its bases."""
    for owner in kind.__mro__:
        for member in vars(owner).values():
            function = getattr(member, "__wrapped__", getattr(member, "fget", member))
            code = getattr(function, "__code__", None)
            if code is not None:
                yield code


class LibraryImports:
    """Around a compat module's imports of private names: an ImportError becomes the same message as a missing name.

    A library that is not installed at all keeps its ModuleNotFoundError: other checks report it.
    """

    def __init__(self, module: str) -> None:
        self._guards = guards_in(module)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, ImportError):
            return
        missing = str(error.name or "")
        package = missing.partition(".")[0]
        if missing == package and isinstance(error, ModuleNotFoundError):
            return
        concerned = [guard for guard in self._guards if any(name.startswith(f"{missing}:") for name in guard.names)]
        concerned = concerned or [guard for guard in self._guards if guard.package == package]
        if concerned:
            raise ConfigError(_problem(concerned[0], f"does not import: {error}")) from error


def changed_source(module: str, text: str) -> ConfigError:
    """The error for a library module whose source no longer holds the text that the CPU path replaces."""
    (guard, *_) = guards_in("parallel.compat.megatron_cpu")
    return ConfigError(_problem(guard, f"no longer holds {text!r} once in {module}"))


def _problem(guard: Guard, what: str) -> Problem:
    first, last = TESTED[guard.library]
    tested = first if first == last else f"{first} to {last}"
    rule = (
        f"{guard.library} {what}; {guard.guard} knows {guard.library} {tested} and needs it. Without this guard: {guard.symptom}"
    )
    return Problem(guard.library, installed_version(guard.library), rule, f"pip install '{guard.library}=={last}'")


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block, and what it was before afterwards."""
    # Not getattr: of a class it would lose that a method is static.
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
