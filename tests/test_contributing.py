"""The recipes of CONTRIBUTING.md: the files that they name exist, and what they tell people to write works."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.errors import Problem
from configs.load import load_config
from configs.schema import Config
from parallel.compat.faults_megatron import MEGATRON_GUARDS
from parallel.compat.index import GUARDS
from parallel.legality.rules import reads
from pretrain.metrics.sinks import Sink, Sinks
from tools.convert.families import FAMILIES
from tools.convert.families.qwen3_moe import QWEN3_MOE

ROOT = Path(__file__).resolve().parents[1]


def test_named_files_exist() -> None:
    named = re.findall(r"`([a-z_0-9]+/[a-z_0-9/]+(?:\.py|\.txt)?/?)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(named) > 12
    assert not [name for name in named if not (ROOT / name).exists()]


def test_a_copied_family_is_a_family() -> None:
    toy = dataclasses.replace(QWEN3_MOE, name="toy", model_types=("toy",))
    assert QWEN3_MOE in FAMILIES and toy.settings == QWEN3_MOE.settings


def test_a_rule_is_a_function_with_the_keys_that_it_reads() -> None:
    @reads("run.steps")
    def few_steps(config: Config) -> Iterable[Problem]:
        if (config.run.steps or 0) > 5:
            yield Problem("run.steps", config.run.steps, "must be at most 5", "set run.steps=5")

    config = load_config("quickstart", ["run.steps=6"]).config
    assert few_steps.applies([]) and not few_steps.applies(["run.steps"])
    assert [problem.path for problem in few_steps.check(config)] == ["run.steps"]


def test_a_sink_has_three_methods() -> None:
    class Toy:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def write(self, row: dict[str, Any]) -> None:
            self.seen.append(row)

        def show_message(self, text: str) -> None:
            self.seen.append(text)

        def close(self, outcome: object) -> None:
            self.seen.append(outcome)

    toy = Toy()
    sink: Sink = toy
    sinks = Sinks([sink])
    sinks.write({"step": 1})
    sinks.show_message("saved")
    sinks.close(None)
    assert toy.seen == [{"step": 1}, "saved", None]


def test_guards_of_a_library_are_in_the_index() -> None:
    assert MEGATRON_GUARDS and set(MEGATRON_GUARDS) <= set(GUARDS)
