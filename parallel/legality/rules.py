"""The parts of a rule between keys.

A rule is a short function of the config that yields problems or notices. It declares the keys that it reads, and is skipped
when one of them is bad by itself. A rule therefore never sees a degree of zero or an unknown choice.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from configs.schema import Config
from parallel.layout import world_size

Found = TypeVar("Found")


@dataclass(frozen=True)
class LegalityRule(Generic[Found]):
    """`check` yields what breaks the rule in a config; `reads` names the keys and sections that it reads."""

    name: str
    reads: tuple[str, ...]
    check: Callable[[Config], Iterable[Found]]

    def applies(self, bad_paths: Iterable[str]) -> bool:
        """True when none of the keys read is bad by itself."""
        return not any(path == key or path.startswith((key + ".", key + "[")) for path in bad_paths for key in self.reads)


def reads(*keys: str) -> Callable[[Callable[[Config], Iterable[Found]]], LegalityRule[Found]]:
    """Turns a function into a `LegalityRule` that reads `keys`."""
    return lambda check: LegalityRule(check.__name__, keys, check)


def near_multiples(value: int, base: int) -> str:
    """The multiples of `base` next to `value`, as text for a fix: "6 or 8"."""
    lower = value // base * base
    return f"{lower} or {lower + base}" if lower else str(base)


def near_divisors(value: int, wanted: int) -> str:
    """The divisors of `value` next to `wanted`, as text for a fix."""
    divisors = [d for d in range(1, value + 1) if value % d == 0] if value <= 1 << 16 else [1]
    lower = [d for d in divisors if d < wanted]
    upper = [d for d in divisors if d >= wanted]
    return " or ".join(str(d) for d in lower[-1:] + upper[:1])


def has_experts(config: Config) -> bool:
    """True for a MoE model."""
    return config.model.moe.num_experts > 0


def on_gpu(config: Config) -> bool:
    """True when ranks compute on GPUs: cluster.device = cuda, or cluster.device = auto and cluster.gpu is set."""
    return config.cluster.device == "cuda" or (config.cluster.device == "auto" and config.cluster.gpu is not None)


def data_size(config: Config) -> int | None:
    """The data parallel degree, or None when the degrees don't divide the world."""
    size = config.parallel.tensor * config.parallel.context * config.parallel.pipeline
    return world_size(config) // size if world_size(config) % size == 0 else None
