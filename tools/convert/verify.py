"""Verification of a conversion: logits of the Megatron-Core model and of transformers' model on the same tokens, in fp32 on CPU.

In: a checkpoint, a Hugging Face folder. Out: {"ok", "max_abs_diff", "argmax_agreement", …}. The two sides share no code of
Phalanx: transformers reads the folder, Megatron-Core reads the checkpoint. Prediction depths (MTP) are compared by their own
logits where transformers has a model of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from tools.convert.checkpoints import find_checkpoint, model_of, open_manifest
from tools.convert.hf_config.model_differences import model_differences
from tools.convert.hf_config.preset import interpret_config, read_config
from tools.convert.megatron_model import depth_logits_of, loaded_model, logits_of
from tools.convert.transformers_model import depths_obstacle, transformers_logits

AGREEMENT = 0.99
"""Smallest share of tokens whose most likely next token must agree. Ties and rounding may change a few."""


def verify(path: Path, hf: Path, layers: int | None, sequences: int, length_tokens: int, tolerance: float) -> dict[str, Any]:
    """Compare the logits of the two models on random tokens.

    `ok`: the largest difference is within `tolerance`, which is scaled up for logits beyond 10, and AGREEMENT is reached.
    Raises ConfigError.
    """
    folder = find_checkpoint(path)
    model = model_of(open_manifest(folder))
    config = read_config(hf)
    _, theirs, problems, _ = interpret_config(config)
    fix = "name the folder it came from"
    if theirs.vocab_size != model.vocab_size:
        rule = f"must have the checkpoint's {model.vocab_size} tokens"
        problems.append(Problem("config.json: vocab_size", theirs.vocab_size, rule, fix))
    if theirs.num_layers != model.num_layers:
        rule = f"must have the checkpoint's {model.num_layers} layers"
        problems.append(Problem("config.json: num_hidden_layers", theirs.num_layers, rule, fix))
    if problems:
        raise ConfigError(problems)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.vocab_size or 1, (sequences, length_tokens), generator=generator)
    kept = min(layers or model.num_layers, model.num_layers)
    depths = model.mtp.num_layers
    obstacle = depths_obstacle(config, theirs, kept) if depths else ""
    compared = 0 if obstacle else depths
    expected = transformers_logits(hf, config, tokens, kept, compared)
    with loaded_model(folder, model, length_tokens, kept, with_depths=compared > 0) as chunk:
        got = depth_logits_of(chunk, tokens) if compared else [logits_of(chunk, tokens)]
    main, *ahead = (_differ(ours, other, tolerance) for ours, other in zip(got, expected, strict=True))
    notes = [f"the configs differ: {text}" for text in model_differences(_without_depths(model), _without_depths(theirs))]
    if obstacle:
        notes.append(f"not compared: the {depths} prediction depths of the checkpoint; {obstacle}")
    return {
        "ok": main.ok and all(depth.ok for depth in ahead),
        "max_abs_diff": main.largest,
        "mean_abs_diff": main.mean,
        "max_abs_logit": main.scale,
        "argmax_agreement": main.agreement,
        "tolerance": tolerance,
        "tokens": tokens.numel(),
        "layers": kept,
        "layers_total": model.num_layers,
        "mtp_layers_compared": compared,
        "mtp_layers_not_compared": depths - compared,
        "mtp_max_abs_diff": max((depth.largest for depth in ahead), default=None),
        "mtp_argmax_agreement": min((depth.agreement for depth in ahead), default=None),
        "notes": notes,
    }


@dataclass(frozen=True)
class _Difference:
    """How two tensors of logits differ. `scale`: the largest logit of the reference. `agreement`: share of equal argmaxes."""

    largest: float
    mean: float
    scale: float
    agreement: float
    ok: bool


def _differ(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> _Difference:
    difference = (got - expected).abs()
    largest, scale = float(difference.max()), float(expected.abs().max())
    agreement = float((got.argmax(-1) == expected.argmax(-1)).float().mean())
    within = largest <= tolerance * max(1.0, scale / 10)
    return _Difference(largest, float(difference.mean()), scale, agreement, within and agreement >= AGREEMENT)


def _without_depths(model: Model) -> Model:
    return replace(model, mtp=replace(model.mtp, num_layers=0))
