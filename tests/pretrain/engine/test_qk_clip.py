"""QK-clip: after it the same batch gives no logit above the threshold. Maxima against plain attention. Refused steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from configs.schema import Config
from parallel.architecture import delta_layers
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_engine, make_model
from pretrain.model.attention import Window
from pretrain.model.attention_logits import largest_logits
from tests.pretrain.world import VOCAB, batches_of, small_config
from tests.ranks import run_ranks

TAU = 0.4
MODELS: dict[str, dict[str, Any]] = {
    "one key a head": {"model__attention__num_query_groups": None, "optimizer__muon__qk_clip_alpha": 0.3},
    "grouped keys and biases": {"model__attention__qkv_bias": True},
    "latent attention": {
        "model__attention__num_query_groups": None, "model__attention__head_dim": None, "model__mla__kv_lora_rank": 16,
        "model__mla__q_lora_rank": 20, "model__mla__qk_nope_head_dim": 12, "model__mla__qk_rope_head_dim": 8,
        "model__mla__v_head_dim": 10, "optimizer__muon__qk_clip_alpha": 0.7,
    },
    "a window, documents, a prediction depth": {
        "model__attention__window_size_tokens": 5, "data__document_mask": True, "model__mtp__num_layers": 1,
    },
    "gated delta nets and output gates": {
        "model__delta_net__pattern": [1, 0], "model__delta_net__num_key_heads": 2, "model__delta_net__num_value_heads": 4,
        "model__delta_net__key_head_dim": 10, "model__delta_net__value_head_dim": 7, "model__attention__output_gate": True,
        "model__norm": "zero_centered_rmsnorm",
    },
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2·pp2 megatron 1": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "cp2·ep2 megatron 0": (2, {"parallel__context": 2, "zero__stage": 0}),
    "dp2 deepspeed 3": (2, {"zero__engine": "deepspeed", "zero__stage": 3}),
}


def clip_config(model: str, layout: str) -> Config:
    world, degrees = LAYOUTS[layout]
    return small_config(
        launch__processes_per_node=world, optimizer__kind="muon", optimizer__muon__qk_clip=TAU, model__attention__qk_norm=False,
        model__init_std=0.3, **MODELS[model], **degrees,
    )  # fmt: skip


def twice(config: Config, refuse: bool) -> tuple[list[np.ndarray], list[tuple[list[float], float]]]:
    """On a forked rank: the same batch twice, with no update to speak of. Maxima [attentions, heads], and by layer."""
    layout = make_layout(config)
    runtime = start({"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())})
    chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, VOCAB, None)
    groups = make_groups(layout, config.run.seed)
    engine = make_engine(config, make_model(config, VOCAB, layout, chunks, groups, runtime.device), groups, runtime.device)
    for part in engine.local_state(False):
        if part.name.endswith("linear_qkv.bias"):
            # Biases begin at zero, and a scaled zero would prove nothing.
            (first,), (length,) = part.tensor_slice.offset, part.tensor_slice.shape
            values = torch.linspace(-1, 1, part.global_shape[0])[first : first + length]
            part.data.copy_(values[part.start : part.stop])
    engine.loaded(None)
    found, layers = [], []
    for _ in range(2):
        batches = batches_of(config, 0, groups.dp.rank(), groups.dp.size())
        engine.step(batches, 1e-12, lambda loss, norm: not refuse)
        assert engine.logits is not None
        found.append(engine.logits.newest.numpy().copy())
        layers.append(engine.logits.by_layer())
        engine.evaluate(batches_of(config, 1, groups.dp.rank(), groups.dp.size()))
    return found, layers


CASES = [
    *((model, "one") for model in MODELS),
    ("latent attention", "tp2·pp2 megatron 1"),
    ("a window, documents, a prediction depth", "cp2·ep2 megatron 0"),
    *(
        pytest.param(model, layout, marks=pytest.mark.prove)
        for model, layout in (
            ("one key a head", "tp2·pp2 megatron 1"), ("grouped keys and biases", "tp2·pp2 megatron 1"),
            ("grouped keys and biases", "dp2 deepspeed 3"), ("latent attention", "dp2 deepspeed 3"),
            ("gated delta nets and output gates", "tp2·pp2 megatron 1"), ("gated delta nets and output gates", "dp2 deepspeed 3"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_no_logit_is_above_the_threshold_after_a_step(model: str, layout: str) -> None:
    """The first attention sees the same inputs again, so its heads end at the threshold, or stay where they were below it."""
    ranks = run_ranks(LAYOUTS[layout][0], twice, clip_config(model, layout), False)
    (first, second), layers = ranks[0]
    assert (first[0] > TAU).any(), "some head is clipped"
    assert second[0] == pytest.approx(np.minimum(first[0], TAU), rel=1e-4)
    assert all(others == layers for _, others in ranks), "every rank reports the same"
    with_attention = delta_layers(clip_config(model, layout).model).index(False)
    assert len(layers[0][0]) == 4 and layers[0][0][with_attention] == first[0].max()
    assert layers[0][0][:with_attention] == [float("-inf")] * with_attention
    assert (layers[0][1] > 0) == ("prediction" in model)
    if layout != "one":
        (_, alone), *_ = run_ranks(1, twice, clip_config(model, "one"), False)
        for got, want in zip(layers, alone, strict=True):
            assert got[0] == pytest.approx(want[0], rel=1e-4)


def clipped_rows(config: Config) -> tuple[np.ndarray, int]:
    """On one rank: the factor of each row of the first attention's products after a step, and how many heads were clipped."""
    layout = make_layout(config)
    runtime = start({"RANK": "0", "WORLD_SIZE": "1"})
    groups = make_groups(layout, config.run.seed)
    chunks = make_chunks(config.model, 1, 1, VOCAB, None)
    engine = make_engine(config, make_model(config, VOCAB, layout, chunks, groups, runtime.device), groups, runtime.device)
    weight = next(part.data for part in engine.local_state(False) if part.name.endswith("1.self_attention.linear_qkv.weight"))
    before = weight.clone()
    engine.step(batches_of(config, 0, 0, 1), 1e-12, lambda loss, norm: True)
    assert engine.logits is not None
    factors = (weight / before).view(-1, config.model.hidden_size).mean(dim=1)
    return factors.numpy(), int((engine.logits.newest[0] > TAU).sum())


def test_output_gates_keep_their_rows() -> None:
    """The heads end at the threshold (above), and no other rows are scaled: those of gates, keys and values stay."""
    config = clip_config("gated delta nets and output gates", "one")
    (factors, clipped), *_ = run_ranks(1, clipped_rows, config)
    assert clipped and (factors < 1 - 1e-4).sum() == clipped * config.model.attention.head_dim  # type: ignore[operator]


def test_a_refused_step_clips_nothing() -> None:
    ((first, second), _), *_ = run_ranks(1, twice, clip_config("one key a head", "one"), True)
    assert np.array_equal(first, second)


def test_maxima_are_those_of_plain_attention() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(300, 2, 4, 6, generator=generator), torch.randn(300, 2, 2, 6, generator=generator)
    documents = torch.randint(0, 3, (2, 300), generator=generator).cumsum(dim=1)
    hidden = (documents[:, :, None] != documents[:, None, :])[:, None]
    scores = torch.einsum("sbgpd,tbgd->bgpst", query.view(300, 2, 2, 2, 6), key).reshape(2, 4, 300, 300) * 0.5
    age = torch.arange(300)[:, None] - torch.arange(300)[None, :]
    seen = (age >= 0) & (age < 40) & ~hidden
    want = scores.masked_fill(~seen, float("-inf")).amax(dim=(0, 2, 3))
    assert torch.allclose(largest_logits(query, key, 0.5, torch.arange(300), Window(40, False), hidden), want)
