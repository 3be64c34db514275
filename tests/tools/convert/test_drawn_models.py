"""Drawn models of every family: a conversion is bit for bit both ways with transformers' logits, or refused before it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.errors import ConfigError
from tests.tools.convert.drawn import make_drawn
from tests.tools.convert.test_families import run_export, run_import, tensors
from tests.tools.convert.tiny import MODELS
from tools.convert.verify import verify

SEEDS = range(6)


def load(folder: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """(logits [1, 60, vocabulary] in fp32, what the loader missed or left over) of transformers' model of a folder."""
    options: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    with torch.no_grad():
        return model(torch.arange(60)[None], use_cache=False).logits, {key: value for key, value in info.items() if value}


@pytest.mark.prove
@pytest.mark.parametrize("name", MODELS)
def test_a_drawn_model_comes_back_the_same_or_is_refused(name: str, tmp_path: Path) -> None:
    # Rounding in gated delta nets (docs/gated-delta-nets.md, small epsilons).
    converted, tolerance = 0, 5e-4 if "linear_conv_kernel_dim" in MODELS[name][1] else 1e-4
    for seed in SEEDS:
        hf, checkpoint, out = (tmp_path / f"{seed}_{part}" for part in ("hf", "checkpoint", "out"))
        form = make_drawn(name, seed, hf)
        if form is None:
            continue
        expected, info = load(hf)
        assert not info, seed
        try:
            run_import(hf, checkpoint)
        except ConfigError:
            assert not list(tmp_path.glob(f"{seed}_checkpoint*")), seed
            continue
        converted += 1
        verdict = verify(checkpoint, hf, None, 2, 60, tolerance)
        assert verdict["ok"] and not verdict["notes"], (seed, verdict)
        run_export(checkpoint, out)
        before, after = tensors(hf), tensors(out)
        if form == "a tied table twice" and "lm_head.weight" not in after:
            before.pop("lm_head.weight")
        assert before.keys() == after.keys(), seed
        assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before), seed
        again, info = load(out)
        assert not info and torch.allclose(again, expected, atol=1e-4, rtol=1e-5), (seed, info)
    assert converted >= 2
