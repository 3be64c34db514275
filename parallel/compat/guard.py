"""One fault of a library and what keeps it away from a run: a row of parallel/compat/index.py.

Torch-free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Library -> (first, last) version that was tested.
TESTED = {
    "megatron-core": ("0.16.1", "0.16.1"),
    "deepspeed": ("0.19.8", "0.19.8"),
    "torch": ("2.13.0", "2.13.0"),
    "wandb": ("0.31.0", "0.31.0"),
}
_PACKAGES = {"megatron-core": "megatron"}


@dataclass(frozen=True)
class Guard:
    """A fault, or a private part of a library that we rely on.

    `first`, `last`: library versions that are known to need the guard; None: no version without the fault is known.
    `guard`: `our.module:function` or `our.module:Class.method`, which states the fault in its docstring.
    `symptom`: what a run without the guard does. `test`: the node id of a test that fails without the guard.
    `names`: private names that must exist, `package.module:Class.attribute`; `Class#attribute` is one that a method of the
    class sets on its instances.
    """

    fault: str
    library: str
    guard: str
    symptom: str
    test: str
    names: tuple[str, ...] = ()
    first: str | None = None
    last: str | None = None

    @property
    def module(self) -> str:
        """Our module that holds the guard."""
        return self.guard.partition(":")[0]

    @property
    def package(self) -> str:
        """The library's package, as it is imported."""
        return _PACKAGES.get(self.library, self.library)

    @property
    def versions(self) -> tuple[str, str | None]:
        """(first, last) version that needs the guard; the first is the oldest tested one unless stated."""
        return self.first or TESTED[self.library][0], self.last

    def needed_by(self, version: str) -> bool:
        """Does this version of the library need the guard?"""
        first, last = self.versions
        return _numbers(version) >= _numbers(first) and (last is None or _numbers(version) <= _numbers(last))


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.19.2rc1 gives (0, 19, 2)."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))
