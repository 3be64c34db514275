"""What differs from machine to machine is asked of each, and said once."""

from __future__ import annotations

import errno
import os

import torch.distributed as dist

from configs.errors import ConfigError, DiskError, Problem
from pretrain.rank.rank_zero import gather_machine_problems, group_by_problem, run_on_rank_0
from tests.ranks import run_ranks

LACKS = Problem("zero.nvme_path", "/local", "must be a folder that can be written", "make it")
OTHER = Problem("cluster.device", "cuda", "training on a GPU needs Transformer Engine", "install it")


def test_one_problem_for_all_machines_that_have_it() -> None:
    found = [("node0", []), ("node1", [LACKS]), ("node2", [OTHER, LACKS])]
    assert [(problem.path, problem.rule) for problem in group_by_problem(found)] == [
        (LACKS.path, f"{LACKS.rule}; so on 2 of 3 machines, the first is node1"),
        (OTHER.path, f"{OTHER.rule}; so on 1 of 3 machines, the first is node2"),
    ]
    assert group_by_problem([("here", [LACKS])]) == [LACKS]


def ask() -> tuple[int, list[str]]:
    """Two machines of two ranks, the second of which lacks something. Out: (times asked, rules told)."""
    rank, asked = dist.get_rank(), 0

    def check() -> list[Problem]:
        nonlocal asked
        asked += 1
        return [LACKS] if rank >= 2 else []

    told = [problem.rule for problem in gather_machine_problems(rank % 2, check)]
    return asked, told


def test_the_first_rank_of_each_machine_is_asked_and_rank_0_told() -> None:
    told = [f"{LACKS.rule}; so on 1 of 2 machines, the first is {os.uname().nodename}"]
    assert run_ranks(4, ask) == [(1, told), (0, []), (1, []), (0, [])]


def refuse() -> list[tuple[object, str]]:
    """(exit code, rule) of what rank 0 refuses: first bad input, then what a disk refused."""
    seen: list[tuple[object, str]] = []
    for error in (ConfigError(LACKS), DiskError(OTHER), OSError(errno.EIO, "Input/output error", "/runs/a")):

        def work(error: Exception = error) -> None:
            raise error

        try:
            run_on_rank_0(work)
        except SystemExit as left:
            assert isinstance(left.__cause__, ConfigError)
            seen.append((left.code, left.__cause__.problems[0].rule))
    return seen


def test_all_ranks_end_with_the_code_of_rank_0s_refusal() -> None:
    broken = "the file system must accept the file (Input/output error: /runs/a)"
    assert run_ranks(2, refuse) == [[(2, LACKS.rule), (1, OTHER.rule), (1, broken)]] * 2
