"""Variables that would end every rank in a library's traceback are refused by name."""

from __future__ import annotations

import pytest

from parallel.environment import check_environment, num_threads


@pytest.mark.parametrize(("text", "threads"), [("", 1), ("3", 3), ("4,2", 4), (" 4 , 2 ", 4)])
def test_threads_are_a_number_or_a_list_of_nested_levels(text: str, threads: int) -> None:
    assert check_environment({"OMP_NUM_THREADS": text}) == []
    assert num_threads({"OMP_NUM_THREADS": text}) == threads


@pytest.mark.parametrize("text", ["abc", "0", "-1", "1.5", "4;2", "4,"])
def test_other_threads_are_refused(text: str) -> None:
    (problem,) = check_environment({"OMP_NUM_THREADS": text})
    assert problem.path == "OMP_NUM_THREADS" and problem.got == text and "unset it" in problem.fix


def test_warnings_must_stay_warnings() -> None:
    assert check_environment({"PYTHONWARNINGS": "ignore,default::UserWarning"}) == []
    (problem,) = check_environment({"PYTHONWARNINGS": "ignore, error::DeprecationWarning"})
    assert problem.path == "PYTHONWARNINGS"


def test_interfaces_must_be_this_machines() -> None:
    assert check_environment({}) == check_environment({"GLOO_SOCKET_IFNAME": "lo"}) == []
    (problem,) = check_environment({"GLOO_SOCKET_IFNAME": "lo,no_such_if0"})
    assert problem.path == "GLOO_SOCKET_IFNAME" and "which has lo" in problem.rule and "no_such_if0 is not one" in problem.rule
