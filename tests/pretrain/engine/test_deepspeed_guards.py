"""DeepSpeed's silent faults: without each guard a composed layout is wrong, or stands still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from configs.schema import Config
from tests.pretrain.deepspeed_world import Keys, name_of, zero
from tests.pretrain.engine.test_deepspeed_state import make
from tests.pretrain.model.test_parity import EP, PP, TP, VPP, check
from tests.pretrain.world import assemble, largest_difference, small_config, train_small
from tests.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.usefixtures("deepspeed_imported")


def differs(world: int, keys: Keys, timeout_s: float = 60.0) -> bool:
    """True when the layout trains otherwise than one process, or fails."""
    want = run_ranks(1, train_small, small_config())[0]
    try:
        ranks = run_ranks(world, train_small, small_config(launch__processes_per_node=world, **keys), timeout_s=timeout_s)
    except RankFailed:
        return True
    norms, norms_1 = [step[1] for step in ranks[0].steps], [step[1] for step in want.steps]
    if norms != pytest.approx(norms_1, rel=1e-4):
        return True
    return largest_difference(assemble([rank.weights for rank in ranks]), assemble([want.weights]))[0] > 1e-3


def no_sum(*args: Any) -> None:
    """Stands where a sum over tensor ranks or stages stood."""


def managed(settings: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: {**settings(*args), "gradient_accumulation_steps": 4, "managed_gradient_accumulation": True}


def unguarded(name: str, patch: pytest.MonkeyPatch) -> None:
    from parallel.compat.deepspeed import partition as held  # noqa: PLC0415  (after the fixture)
    from pretrain.engine import deepspeed_runtime as runtime  # noqa: PLC0415

    if name == "experts partitioned over all data ranks":
        patch.setattr(runtime, "place_experts", lambda *args: False)
        patch.setattr("pretrain.build.mark_expert_parameters", lambda *args: None)
    elif name == "backward passes in a row":
        patch.delattr(runtime.GuardedEngine, "_backward_prologue")
    elif name == "gradients of the step before":
        patch.delattr(held.CutParameters, "begin")
    elif name == "host gradients of the step before":
        patch.delattr(held.FlatGroups, "begin")
        patch.setattr(runtime, "can_compile", lambda: False)
    elif name == "norms summed over tensor ranks":
        patch.setattr("pretrain.engine.deepspeed_gradients.sum_over_tensor_ranks", no_sum)
    elif name == "no update at all":
        patch.setattr(runtime, "engine_settings", managed(runtime.engine_settings))
    elif name == "stages compare their modules":
        patch.setattr(runtime, "compare_orders_within", lambda *args: None)


GUARDS: list[tuple[str, int, Keys]] = [
    ("experts partitioned over all data ranks", 2, {EP: 2, **zero(3)}),
    ("backward passes in a row", 2, {PP: 2, **zero(2)}),
    ("backward passes in a row", 2, {PP: 2, **zero(3)}),
    ("gradients of the step before", 2, {PP: 2, VPP: 2, **zero(3)}),
    ("host gradients of the step before", 2, {PP: 2, VPP: 2, **zero(2, zero__offload="optimizer")}),
    ("norms summed over tensor ranks", 2, {TP: 2, **zero(1)}),
    ("no update at all", 1, zero(1)),
    pytest.param("stages compare their modules", 2, {PP: 2, **zero(3)}, marks=pytest.mark.prove),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("fault", "world", "keys"), GUARDS, ids=name_of)
def test_guard(fault: str, world: int, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    unguarded(fault, monkeypatch)
    assert differs(world, keys, timeout_s=30.0)


def test_copies_of_the_embedding_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.engine.deepspeed_gradients.SharedEmbedding.reduce", no_sum)
    with pytest.raises(AssertionError):
        check(2, {PP: 2, **zero(1)}, {"model__tie_embeddings": True})


def optimizer_kind(config: Config) -> str:
    engine: Any = make(config)[0]
    return type(engine.runtime.optimizer).__name__


def test_stage_1_in_bf16_is_partitioned_like_the_others() -> None:
    """DeepSpeed would take BF16_Optimizer, whose state and norm are other ones."""
    assert run_ranks(1, optimizer_kind, small_config(precision__params="bf16", **zero(1)))[0] == "DeepSpeedZeroOptimizer"


def foreign_experts(config: Config) -> bool:
    engine: Any = make(config)[0]
    return engine.runtime.has_moe_layers


def test_the_engine_knows_foreign_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guards DeepSpeed refuses experts that it did not build, or takes the model for a dense one."""
    from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: PLC0415  (after the fixture)

    from parallel.compat.deepspeed.guards import GuardedEngine  # noqa: PLC0415

    config = small_config(launch__processes_per_node=2, **{EP: 2, **zero(2)})
    assert run_ranks(2, foreign_experts, config) == [True, True]
    monkeypatch.setattr(GuardedEngine, "_validate_zero3_moe_compatibility", DeepSpeedEngine._validate_zero3_moe_compatibility)
    with pytest.raises(RankFailed, match="MoE"):
        run_ranks(2, foreign_experts, small_config(launch__processes_per_node=2, **{EP: 2, **zero(3)}))
    monkeypatch.delattr(GuardedEngine, "has_moe_layers")
    assert run_ranks(2, foreign_experts, config) == [False, False]


def test_tied_embeddings_are_gathered_for_prediction_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"model__tie_embeddings": True, "model__mtp__num_layers": 1}
    check(2, {PP: 2, **zero(3)}, model)
    monkeypatch.setattr("pretrain.engine.deepspeed_runtime.gather_tied_embedding", lambda chunks: None)
    with pytest.raises(RankFailed, match="supplied weight's shape is"):
        run_ranks(1, train_small, small_config(**zero(3), **model))
