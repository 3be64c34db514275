"""Runs of every kind of model against a trainer that shares no code with them: all numbers, gradients and weights.

`make test` holds each architecture, micro-batch and layout at least once, and Muon; `make prove` holds all of their combinations.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.reference import world
from tests.reference.trainer import Judged

# fp32: relative differences. Sums of another order differ by some 1e-6.
TOLERANCE = 2e-5
INDEPENDENT = ("data.py", "model.py", "muon.py", "trainer.py")
OURS = ("configs", "parallel", "pretrain", "launch", "tools")

QUICK = [
    ("deepseek_v3", 4, "one rank"),
    ("qwen3_moe", 1, "ZeRO-2"),
    ("deepseek_v3_muon", 1, "tp2 pp2 ep2"),
    ("mixtral", 4, "ZeRO-3"),
    ("gpt_oss", 1, "cp2 dp2"),
]
ALL = [
    (model, micro, layout)
    for model in world.MODELS
    # How the batch is cut changes nothing that an optimizer does.
    for micro in ((1,) if model in world.OTHER_OPTIMIZERS else (1, 4))
    for layout in world.LAYOUTS
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.prove) for case in ALL if case not in QUICK)]


class Cases:
    """Cases and the trainer's answers, each made once."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place
        self.case = cache(self._case)
        self.judged = cache(self._judged)

    def _case(self, model: str, micro_batch_seqs: int) -> world.Case:
        place = self.place / f"{model}_{micro_batch_seqs}"
        place.mkdir()
        return world.make_case(model, self.folder, micro_batch_seqs, place)

    def _judged(self, model: str, micro_batch_seqs: int, data_parallel: int) -> Judged:
        return self.case(model, micro_batch_seqs).judge(data_parallel)


@pytest.fixture(scope="module")
def cases(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    world.write_short_documents(folder)
    return Cases(folder, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize(("model", "micro_batch_seqs", "layout"), CASES)
def test_a_run_gives_what_the_independent_trainer_gives(
    model: str, micro_batch_seqs: int, layout: str, cases: Cases, tmp_path: Path
) -> None:
    # Only the balance of the global batch depends on how many ranks count at once.
    ranks = world.data_parallel(layout) if model.startswith("gpt_oss") else 1
    want = cases.judged(model, micro_batch_seqs, ranks)
    got = world.run_case(cases.case(model, micro_batch_seqs), layout, tmp_path / "run")
    found = sorted(world.differences(got, want), key=lambda item: -item[1])
    assert len(want.gradient) > 30 and len(want.rows) == world.STEPS
    assert found[0][1] < TOLERANCE, "\n".join(f"{value:.1e} {what}" for what, value in found[:8])


def test_the_trainer_uses_nothing_of_the_package_but_the_config_loader() -> None:
    for name in INDEPENDENT:
        tree = ast.parse((Path(__file__).parent / name).read_text(encoding="utf-8"))
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports relatively"
                modules.add(node.module or "")
        ours = {module for module in modules if module.split(".")[0] in OURS}
        mates = {module for module in modules if module.split(".")[0] == "tests"}
        assert ours <= {"configs.load"}, f"{name} imports {ours}"
        assert mates <= {f"tests.reference.{file.removesuffix('.py')}" for file in INDEPENDENT}, f"{name} imports {mates}"
        assert not any(module.split(".")[0] in ("megatron", "deepspeed") for module in modules)
