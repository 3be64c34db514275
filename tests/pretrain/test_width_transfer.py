"""muP: what each class of weights starts with and how far one step moves it, in both engines; the coordinate check."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import Config
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.mup import HIDDEN, INPUT, OUTPUT, width_class
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_engine, make_model
from pretrain.engine.base import WEIGHT
from tests.pretrain.world import VOCAB, batches_of, small_config
from tests.ranks import run_ranks
from tools.cli import run
from tools.rehearse.coordinates import FLAT, at_width, exponent, measure

RATE, DECAY, M = 1e-3, 0.5, 4
# Yang et al. (arXiv 2203.03466), table 3, with m = 4: (initial standard deviation, learning rate) of Adam.
TABLE_3 = {INPUT: (1.0, 1.0), HIDDEN: (1 / math.sqrt(M), 1 / M), OUTPUT: (1 / M, 1 / M)}
CLASSES = {
    "embedding.word_embeddings.weight": INPUT,
    "decoder.final_layernorm.weight": INPUT,
    "decoder.layers.0.self_attention.linear_qkv.weight": HIDDEN,
    "decoder.layers.0.self_attention.linear_proj.weight": HIDDEN,
    "decoder.layers.0.mlp.experts.linear_fc1.weight": HIDDEN,
    "decoder.layers.0.mlp.router.weight": OUTPUT,
    "decoder.layers.0.mlp.shared_experts.gate_weight": OUTPUT,
    "output_layer.weight": OUTPUT,
}


def one_step(config: Config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (initial values, values after one step), both [elements]."""
    layout, runtime = make_layout(config), start(os.environ)
    groups = make_groups(layout, config.run.seed)
    model = make_model(config, VOCAB, layout, make_chunks(config.model, 1, 1, VOCAB, None), groups, runtime.device)
    engine = make_engine(config, model, groups, runtime.device)

    def weights() -> dict[str, torch.Tensor]:
        return {part.name: part.data.detach().clone().flatten() for part in engine.owned_state() if part.kind == WEIGHT}

    before = weights()
    engine.step(batches_of(config, 0, 0, 1), RATE)
    after = weights()
    return {name: (before[name].numpy(), after[name].numpy()) for name in before}


@pytest.mark.parametrize(("engine", "stage"), [("megatron", 0), ("megatron", 1), ("deepspeed", 1)])
def test_a_step_of_adam_moves_each_class_as_the_table_says(engine: str, stage: int, deepspeed_imported: None) -> None:
    """Adam's first step is the learning rate, whatever the gradient's size; decay takes learning rate x decay of the weight."""
    changes: dict[str, Any] = dict(zero__engine=engine, zero__stage=stage, optimizer__eps=1e-12, optimizer__weight_decay=DECAY)
    changes |= dict(model__moe__shared_ffn_hidden_size=20, model__moe__shared_gate=True, model__scale_init_by_depth=False)
    config = small_config(**changes, model__mup__base_hidden_size=32 // M)
    (moved,) = run_ranks(1, one_step, config)
    for name, expected in CLASSES.items():
        before, after = moved[name]
        std, rate = TABLE_3[expected]
        decayed = before * (1 - RATE * DECAY) if expected != INPUT or "embedding" in name else before
        steps = np.abs(after - decayed)
        # Rows of tokens that don't occur, and experts that no token chose, have no gradient.
        steps = steps[steps > RATE * rate / 2]
        assert len(steps) and np.median(steps) == pytest.approx(RATE * rate, rel=2e-3), name
        if "norm" not in name:
            assert before.std() == pytest.approx(config.model.init_std * std, rel=0.2), name


def test_every_weight_has_the_class_of_its_dims() -> None:
    for name, expected in CLASSES.items():
        assert width_class(name, 1 if "norm" in name else 3 if "experts.linear" in name else 2) == expected, name


@pytest.mark.parametrize("base", [None, 64])
def test_only_with_mup_the_coordinates_stay(base: int | None) -> None:
    config = small_config(model__mup__base_hidden_size=base)
    widths = (1, 4)
    found = [run_ranks(1, measure, at_width(config, width), 3)[0] for width in widths]
    grows = {kind: exponent(widths, [each[kind][-1] for each in found]) > FLAT for kind in found[0]}
    assert set(grows) == {"embedding", "residual", "attention", "mlp", "logits"}
    assert not grows["embedding"] and all(grows[kind] == (base is None) for kind in grows if kind != "embedding"), grows


def test_bad_widths_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("2", "1,x", "0,1", "1,99"):
        assert run(["rehearse", "quickstart", "--coordinates", words]) == 2
        assert "--coordinates" in capsys.readouterr().err
