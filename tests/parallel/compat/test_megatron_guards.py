"""Guards of Megatron-Core that a single process shows; layouts are compared in tests/pretrain/model/test_parity.py."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from configs.schema import Config
from parallel.compat import megatron_private
from parallel.compat.megatron_private import watch_routing
from pretrain.engine import megatron as engine_module
from tests.pretrain.engine.test_deepspeed_state import make
from tests.pretrain.world import batches_of, small_config
from tests.ranks import RankFailed, run_ranks


def yarn(**changes: Any) -> Config:
    config = small_config(**changes)
    scaling = config.model.position.scaling
    scaling.kind, scaling.factor, scaling.original_max_position = "yarn", 4.0, 16
    scaling.beta_fast, scaling.beta_slow = 20.0, 2.0
    return config


def rotation(config: Config) -> tuple[int, float, float]:
    """(angles of a position, YaRN's beta_fast and beta_slow) of the model that a config makes."""
    engine: Any = make(config)[0]
    rope = engine.models[0].module.rotary_pos_emb
    angles, _ = rope(8)
    return angles.shape[-1], rope.beta_fast, rope.beta_slow


def test_yarn_turns_the_asked_part_of_each_head(monkeypatch: pytest.MonkeyPatch) -> None:
    half = yarn(model__position__rotary_fraction=0.5)
    assert run_ranks(1, rotation, half)[0][0] == 6, "half of head_dim 12"
    monkeypatch.setattr("pretrain.model.gpt.yarn_on_part_of_head", lambda whole, fraction, transformer: whole)
    assert run_ranks(1, rotation, half)[0][0] == 12


def test_yarn_settings_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTModel reads them by names that the dataclass does not declare."""
    assert run_ranks(1, rotation, yarn())[0][1:] == (20.0, 2.0)
    monkeypatch.setattr("pretrain.model.megatron_config._yarn", lambda position: {})
    with pytest.raises(RankFailed, match="yarn_rotary_scaling_factor"):
        run_ranks(1, rotation, yarn())


def test_the_local_norm_refuses_sequence_parallelism() -> None:
    """The reason for a norm of ours: when this fails, Megatron-Core's own will do."""
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=2, sequence_parallel=True
    )
    with pytest.raises(AssertionError, match="sequence parallel"):
        WrappedTorchNorm(config, 8)


def restored(config: Config) -> bool:
    """After a restore, does the model compute with the main weights that were read?"""
    engine, _ = make(config)
    for piece in engine.held(with_optimizer=False):
        piece.data.fill_(0.5)
    engine.loaded(None)
    model: Any = engine
    return all(bool((parameter == 0.5).all()) for parameter in model.models[0].parameters())


def test_main_weights_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(precision__params="bf16", zero__stage=0)
    assert run_ranks(1, restored, config) == [True]
    monkeypatch.setattr(engine_module, "publish_main_weights", lambda part: None)
    assert run_ranks(1, restored, config) == [False]


def watched(config: Config) -> list[tuple[int, ...]]:
    engine, groups = make(config)
    model: Any = engine
    shapes: list[tuple[int, ...]] = []
    for module in model.models[0].modules():
        if isinstance(module, TopKRouter):
            watch_routing(module, lambda logits: shapes.append(tuple(logits.shape)))
    engine.step(batches_of(config, 0, groups.dp.rank(), groups.dp.size()), 1e-3)
    return shapes


def test_routing_is_watched() -> None:
    config = small_config()
    shapes = run_ranks(1, watched, config)[0]
    assert len(shapes) == 4 * config.batch.global_batch_seqs, "each of 4 layers, for each micro-batch"
    assert set(shapes) == {(config.batch.seq_length_tokens, 1, 8)}


def losses_twice(config: Config) -> list[list[str]]:
    engine, groups = make(config)
    engine.step(batches_of(config, 0, groups.dp.rank(), groups.dp.size()), 1e-3)
    found = []
    for _ in range(2):
        losses, prediction = megatron_private.take_router_losses(), megatron_private.take_prediction_loss()
        assert prediction is not None
        found.append([key for key, value in losses.items() if value != 0] + ["mtp"] * bool(prediction != 0))
    return found


def test_trackers_start_anew_when_they_are_taken() -> None:
    config = small_config(model__mtp__num_layers=1, model__moe__router__z_loss_coeff=0.01)
    first, second = run_ranks(1, losses_twice, config)[0]
    assert sorted(first) == ["load_balancing_loss", "mtp", "z_loss"] and second == []


def expert_loads(config: Config) -> list[float]:
    """Tokens that the routers still count after a step."""
    engine, groups = make(config)
    model: Any = engine
    engine.step(batches_of(config, 0, groups.dp.rank(), groups.dp.size()), 1e-3)
    return [float(module.local_tokens_per_expert.sum()) for module in model.chunks[0].modules() if hasattr(module, "expert_bias")]


@pytest.mark.usefixtures("deepspeed_imported")
def test_routers_count_each_step_alone() -> None:
    config = small_config(
        zero__engine="deepspeed", zero__stage=1, model__moe__router__score="sigmoid", model__moe__router__expert_bias=True
    )
    assert run_ranks(1, expert_loads, config)[0] == [0.0] * 4
