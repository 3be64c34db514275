"""`phalanx launch` and `phalanx resume`: what `phalanx check` would say, then the start. [p]

In: the words after `phalanx`. Out: the exit code of launch/cli.py. A launcher by itself knows the config only: the data's files,
the room for checkpoints, the run folder and the estimate of memory are looked at here, before anything is queued.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.errors import Notice, Problem
from configs.schema import Config
from launch import cli
from tools.check import judge


def main(argv: list[str]) -> int:
    """`argv[0]` is launch or resume."""
    return cli.main(argv, _verdict)


def _verdict(config: Config, with_data: bool) -> tuple[list[Problem], Sequence[Notice]]:
    found = judge(config, with_data)
    return found.problems, found.notices
