"""One fault of a library and what keeps it away from a run: a row of parallel/compat/index.py.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.compat.versions import is_between

# Library -> (first, last) version that was tested.
TESTED = {
    "megatron-core": ("0.16.1", "0.19.2"),
    "deepspeed": ("0.19.8", "0.19.8"),
    "torch": ("2.13.0", "2.13.0"),
    "wandb": ("0.31.0", "0.31.0"),
}
_PACKAGES = {"megatron-core": "megatron"}


@dataclass(frozen=True)
class Guard:
    """A fault, or a private part of a library that we rely on.

    `first`, `last`: library versions that are known to need the guard; None: no version without the fault is known, also of
    those before and after the tested ones.
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
        return is_between(version, self.first or "0", self.last)
