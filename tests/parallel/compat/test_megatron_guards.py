"""Guards of Megatron-Core that a single process shows; layouts are compared in tests/pretrain/model/test_parity.py."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from configs.schema import Config
from parallel.compat import megatron_private
from parallel.compat.index import is_needed
from parallel.compat.megatron_private import watch_routing
from parallel.compat.prediction_losses import take_prediction_losses
from pretrain.engine import megatron as engine_module
from pretrain.metrics.moe_metrics import MoeMetrics
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
    for state_slice in engine.local_state(with_optimizer=False):
        state_slice.data.fill_(0.5)
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
    """Names of the losses that are not zero, when they are taken after a step and when they are taken again."""
    engine, groups = make(config)
    engine.step(batches_of(config, 0, groups.dp.rank(), groups.dp.size()), 1e-3)
    found = []
    for _ in range(2):
        losses = megatron_private.take_router_losses()
        prediction = take_prediction_losses(1, torch.device("cpu"))
        found.append([key for key, value in losses.items() if value != 0] + ["mtp"] * bool(prediction.any()))
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


def router_gradients(config: Config, masked: bool) -> list[np.ndarray]:
    """Gradients of the routers' weights for one step; `masked`: most labels of the global batch are."""
    engine, groups = make(config)
    batches = batches_of(config, 0, groups.dp.rank(), groups.dp.size())
    for number, batch in enumerate(batches):
        batch.loss_mask.fill_(1.0)
        if masked:
            batch.loss_mask[:, number + 2 :] = 0.0
    engine.step(batches, 0.0)
    model: Any = engine
    routers: list[Any] = [module for module in model.models[0].modules() if isinstance(module, TopKRouter)]
    return [router.weight.main_grad.float().numpy().copy() for router in routers]


@pytest.mark.parametrize("name", ["aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss"])
def test_masked_labels_do_not_change_router_losses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient with a router loss, less the gradient without: what the loss adds, whatever labels count."""
    balance = "none" if name == "z_loss" else name
    weights = {"model__moe__router__balance": balance, "zero__stage": 0, "optimizer__clip_grad_norm": 0.0}
    key = "model__moe__router__z_loss_coeff" if name == "z_loss" else "model__moe__router__aux_loss_coeff"

    def added(masked: bool) -> list[np.ndarray]:
        with_loss, without = (run_ranks(1, router_gradients, small_config(**weights, **{key: c}), masked)[0] for c in (1.0, 0.0))
        return [a - b for a, b in zip(with_loss, without, strict=True)]

    def differ() -> float:
        pairs = list(zip(added(masked=True), added(masked=False), strict=True))
        return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)

    assert differ() < 1e-4
    monkeypatch.setattr("pretrain.engine.schedule_step.router_losses_of_all_tokens", lambda share: nullcontext())
    assert differ() > 1, "the masked batch has a quarter of the valid tokens"


def prediction_loss(config: Config) -> float:
    """mtp_loss of a step in whose first sequence no label counts."""
    engine, groups = make(config)
    model: Any = engine
    moe = MoeMetrics([chunk.module for chunk in model.models], config.model, groups)
    batches = batches_of(config, 0, groups.dp.rank(), groups.dp.size())
    batches[0].loss_mask[0] = 0.0
    engine.step(batches, 0.0)
    return moe.take(len(batches), 1)["mtp_loss"]


def test_prediction_losses_are_means_over_valid_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the global batch is cut, and without a NaN from sequences that have no valid token."""
    model = {"model__mtp__num_layers": 2}

    def cut(micro_batch_seqs: int) -> float:
        return run_ranks(1, prediction_loss, small_config(batch__micro_batch_seqs=micro_batch_seqs, **model))[0]

    whole = cut(4)
    assert whole > 1 and cut(1) == pytest.approx(whole, rel=1e-6) and cut(2) == pytest.approx(whole, rel=1e-6)
    ranks = run_ranks(2, prediction_loss, small_config(launch__processes_per_node=2, parallel__context=2, **model))
    assert ranks == [pytest.approx(whole, rel=1e-6)] * 2
    monkeypatch.setattr("pretrain.build.sum_prediction_losses", lambda: None)
    assert not cut(1) > 0, "nothing is summed without the guard"


def prediction_gradients(config: Config) -> float:
    """The gradient norm of a step of which the sequences have different numbers of valid labels."""
    engine, groups = make(config)
    batches = batches_of(config, 0, groups.dp.rank(), groups.dp.size())
    for number, batch in enumerate(batches):
        batch.loss_mask.fill_(1.0)
        batch.loss_mask[:, -number - 2 :] = 0.0
    return engine.step(batches, 0.0).grad_norm


def test_versions_that_scale_prediction_losses_need_the_guard_and_others_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core from 0.17 on scales a depth's loss by the valid tokens of a context rank's own part."""
    model = {"model__mtp__num_layers": 1, "model__mtp__loss_coeff": 1.0}

    def norm(ranks: int) -> float:
        return run_ranks(
            ranks, prediction_gradients, small_config(launch__processes_per_node=ranks, parallel__context=ranks, **model)
        )[0]

    right = norm(1)
    assert norm(2) == pytest.approx(right, rel=1e-6)
    monkeypatch.setattr("pretrain.build.sum_prediction_losses", lambda: None)
    needed = is_needed("The loss of a prediction depth is scaled by the rank's own counts of valid tokens")
    assert (norm(2) != pytest.approx(norm(1), rel=1e-5)) == needed
    assert (norm(1) == pytest.approx(right, rel=1e-6)) != needed


def latent_without_query_vector(config: Config) -> str:
    """The kind of module that normalises queries which come from no latent vector."""
    engine: Any = make(config)[0]
    (attention, *_) = [module for module in engine.models[0].modules() if isinstance(module, MLASelfAttention)]
    return type(attention.q_layernorm).__name__ if hasattr(attention, "q_layernorm") else "none"


def test_versions_that_replace_latent_modules_need_the_guard_and_others_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(
        model__mla__kv_lora_rank=16, model__mla__q_lora_rank=None, model__mla__qk_nope_head_dim=12,
        model__mla__qk_rope_head_dim=8, model__mla__v_head_dim=10, model__attention__num_query_groups=None,
        model__attention__qk_norm=False, model__attention__head_dim=None,
    )  # fmt: skip
    right = run_ranks(1, latent_without_query_vector, config)
    monkeypatch.setattr("pretrain.model.specs.LatentAttention", MLASelfAttention)
    if is_needed("Latent attention replaces the modules that its spec names where queries come from no latent vector"):
        with pytest.raises(RankFailed):
            run_ranks(1, latent_without_query_vector, config)
    else:
        assert run_ranks(1, latent_without_query_vector, config) == right
