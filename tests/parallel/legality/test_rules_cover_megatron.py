"""What the checks call legal, megatron-core's TransformerConfig accepts: its assertions are never met on the node."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest

from configs.keys import all_keys
from configs.load import load_config
from configs.schema import Config
from parallel.layout import make_layout
from parallel.legality.verdict import check_config
from parallel.stages import make_chunks
from pretrain.model.backend import Backend
from pretrain.model.megatron_config import make_transformer_config

BASES = {
    "grouped queries": {},
    "latent": {
        "model.attention.num_query_groups": None, "model.attention.head_dim": None, "model.attention.qk_norm": False,
        "model.mla.kv_lora_rank": 32, "model.mla.q_lora_rank": 16,
    },
    "deepseek": {
        "model.moe.router.score": "sigmoid", "model.moe.router.expert_bias": True, "model.moe.router.num_groups": 4,
        "model.moe.router.group_top_k": 2, "model.moe.shared_ffn_hidden_size": 64, "model.moe.first_dense_layers": 1,
        "model.mtp.num_layers": 1,
    },
    "hybrid": {
        "model.delta_net.pattern": [1, 0], "model.delta_net.num_key_heads": 4, "model.delta_net.num_value_heads": 8,
        "model.attention.output_gate": True, "model.norm": "zero_centered_rmsnorm", "model.moe.shared_ffn_hidden_size": 64,
        "model.moe.shared_gate": True,
    },
    "biases": {
        "model.mlp_bias": True, "model.attention.qkv_bias": True, "model.attention.output_bias": True,
        "model.moe.router.bias": True, "model.activation": "gpt_oss_glu",
    },
}  # fmt: skip
SMALL: dict[str, list[Any]] = {
    "parallel.tensor": [1, 2, 4], "parallel.pipeline": [1, 2, 4], "parallel.virtual_pipeline": [None, 2, 3],
    "parallel.context": [1, 2], "parallel.expert": [1, 2, 4, 8], "parallel.expert_tensor": [1, 2],
    "launch.processes_per_node": [4, 8, 16], "model.num_layers": [2, 4, 5, 8], "model.moe.num_experts": [0, 4, 8],
    "model.moe.top_k": [1, 2, 4], "model.attention.num_query_groups": [None, 1, 2, 4], "model.mtp.num_layers": [0, 1, 2],
    "model.moe.capacity_factor": [None, 1.0], "model.moe.shared_ffn_hidden_size": [None, 64], "recompute.num_layers": [1, 2],
    "model.attention.window_size_tokens": [None, 16], "batch.global_batch_seqs": [32, 64],
    "parallel.sequence": [None, True, False],
    "model.moe.router.num_groups": [None, 2, 4], "model.moe.router.group_top_k": [None, 1, 2], "model.vocab_size": [2048],
    "recompute.modules": [["core_attn"], ["moe"], ["mlp"], ["shared_experts"], ["mla_up_proj"], ["layernorm", "moe_act"]],
}  # fmt: skip


def owner_of(config: Config, path: str) -> tuple[Any, str]:
    """The section object that holds a key, and the key's name."""
    owner: Any = config
    *sections, name = path.split(".")
    for section in sections:
        owner = getattr(owner, section)
    return owner, name


def choices() -> dict[str, list[Any]]:
    """What each key of the architecture and the parallelism may be set to."""
    found = dict(SMALL)
    for key in all_keys().values():
        if key.kind == "scalar" and key.path.startswith(("model.", "recompute.", "precision.params")) and key.path not in found:
            owner, name = owner_of(Config(), key.path)
            rule = type(owner).__dataclass_fields__[name].metadata["rule"]
            if rule.choices:
                found[key.path] = list(rule.choices)
            elif key.type is bool:
                found[key.path] = [False, True]
    return found


@pytest.mark.parametrize("tries", [300, pytest.param(1500, marks=pytest.mark.prove)])
@pytest.mark.parametrize("base", BASES)
def test_what_is_legal_is_accepted(base: str, tries: int) -> None:
    draw, table, legal = random.Random(base), choices(), 0
    quickstart = load_config("quickstart").config
    backend = Backend(transformer_engine=False, grouped_experts=True, fused_wgrad=False, fp8=None)
    for _ in range(tries):
        config = copy.deepcopy(quickstart)
        values = BASES[base] | {key: draw.choice(table[key]) for key in draw.sample(sorted(table), draw.randint(1, 6))}
        for key, value in values.items():
            owner, name = owner_of(config, key)
            setattr(owner, name, value)
        if not check_config(config).ok:
            continue
        legal += 1
        layout = make_layout(config)
        chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, 2048, config.parallel.pipeline_split)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                make_transformer_config(config, layout, chunks, backend)
            except Exception as error:
                raise AssertionError(f"legal, but megatron-core refuses {values}: {error}") from error
    assert legal > tries / 10
