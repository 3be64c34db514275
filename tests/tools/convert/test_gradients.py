"""Gradients of imported weights are transformers', through the norms, routers and layers that Megatron-Core lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_model
from pretrain.checkpoint.read import CheckpointReader
from tests.ranks import run_ranks
from tests.tools.convert.test_families import run_import
from tests.tools.convert.tiny import make
from tools.convert.checkpoints import model_of, open_manifest
from tools.convert.megatron_model import inference_config, weight_slices

LENGTH = 24
# Model -> changes, names of a layer's router and of its norm of keys in transformers.
CASES = {
    "minimax_m2": ({}, "mlp.gate.weight", "self_attn.k_norm.weight"),
    "ernie4_5_moe": ({}, "mlp.gate.weight", None),
    "hunyuan_v1_moe": ({}, "mlp.gate.wg.weight", "self_attn.key_layernorm.weight"),
    "llama4": ({}, "feed_forward.router.weight", None),
    "flex_olmo": ({}, "mlp.gate.weight", "self_attn.k_norm.weight"),
    "exaone_moe": ({}, "mlp.gate.weight", "self_attn.k_norm.weight"),
    "deepseek_v2": (
        {"topk_method": "group_limited_greedy", "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
        "mlp.gate.weight", None,
    ),
}  # fmt: skip
Gradients = dict[str, NDArray[np.float32]]


def batch(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, vocab, (2, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(folder: Path) -> Gradients:
    """The gradient of the summed loss for every parameter, by its name on this one rank."""
    config = inference_config(model_of(open_manifest(folder)), LENGTH)
    start({"RANK": "0", "WORLD_SIZE": "1"})
    layout, vocab = make_layout(config), config.model.vocab_size or 0
    groups = make_groups(layout, config.run.seed)
    chunks = make_chunks(config.model, 1, 1, vocab)
    (chunk,) = make_model(config, vocab, layout, chunks, groups, torch.device("cpu"))
    CheckpointReader(folder).fill(weight_slices(chunk, groups))
    tokens, labels = batch(vocab)
    chunk.eval()(tokens, torch.arange(LENGTH).expand_as(tokens), None, labels=labels).sum().backward()
    return {name: value.grad.numpy() for name, value in chunk.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    changes, router, key_norm = CASES[name]
    model = make(name, tmp_path / "hf", **changes)
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    (ours,) = run_ranks(1, gradients, tmp_path / "checkpoint")
    tokens, labels = batch(90)
    F.cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    theirs = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    # The gradient of the embedding has gone through every layer.
    pairs = {"embedding.word_embeddings.weight": "model.embed_tokens.weight"}
    pairs["decoder.layers.1.mlp.router.weight"] = f"model.layers.1.{router}"
    pairs["decoder.layers.0.self_attention.linear_proj.weight"] = "model.layers.0.self_attn.o_proj.weight"
    pairs |= {"decoder.layers.0.self_attention.k_layernorm.weight": f"model.layers.0.{key_norm}"} if key_norm else {}
    for mine, other in pairs.items():
        expected = theirs[other].numpy()
        difference = np.abs(ours[mine][: len(expected)] - expected).max()
        assert difference < 1e-4 * np.abs(expected).max(), (mine, difference, np.abs(expected).max())
