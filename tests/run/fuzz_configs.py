"""Random configs that `check` passes, by seed: what the fuzz trains, and what rehearsals must be able to shrink.

In: a seed. Out: key=value words over a small model. Values that `check` refuses are drawn again, a few at a time, so that
rare combinations of legal values come up too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import Config
from parallel.legality.verdict import check_config
from pretrain.preflight.verdict import preflight

BASE = (
    "model={num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, attention: {num_heads: 4, num_query_groups: 2, head_dim: 8}}",
    "model.moe={num_experts: 4, top_k: 2, ffn_hidden_size: 32}", "cluster.device=cpu", "precision.params=fp32",
    "batch={global_batch_seqs: 8, micro_batch_seqs: 1, seq_length_tokens: 32}", "run={name: fuzzed, steps: 3, eval_batches: 1}",
    "schedule.warmup_steps=1", "metrics.sinks=[jsonl]", "launch.watch.probe_interval_steps=null", "optimizer.lr=1e-3",
    "parallel={pipeline: 1, expert: 1}", "checkpoint.interval_steps=2",
)  # fmt: skip

MLA = "{kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}"
YARN = "{kind: yarn, factor: 4, original_max_position: 16}"
DELTA = "{pattern: [1, 0], num_key_heads: 4, num_value_heads: 8, key_head_dim: 6, value_head_dim: 5}"

# Values of each key, as they are written on a command line.
VALUES: dict[str, tuple[str, ...]] = {
    "launch.processes_per_node": ("1", "2", "2", "4"),
    "parallel.tensor": ("2", "4"),
    "parallel.pipeline": ("2", "4"),
    "parallel.virtual_pipeline": ("2",),
    "parallel.context": ("2",),
    "parallel.expert": ("2", "4"),
    "parallel.expert_tensor": ("2",),
    "parallel.sequence": ("true", "false"),
    "parallel.pipeline_split": ("[1, 1]", "[2, 0]", "[0, 2]", "[3, 1]", "[1, 0, 1, 1]"),
    "parallel.overlap_expert_comm": ("true",),
    "zero.engine": ("deepspeed", "deepspeed", "megatron"),
    "zero.stage": ("0", "1", "2", "3"),
    "zero.offload": ("optimizer", "param"),
    "zero.overlap_grad_reduce": ("true",),
    "zero.overlap_param_gather": ("true",),
    "precision.params": ("bf16",),
    "precision.grads": ("bf16",),
    "recompute.mode": ("selective", "full"),
    "recompute.modules": ("[core_attn]", "[moe]", "[layernorm]", "[mlp]", "[moe_act]", "[mla_up_proj]", "[shared_experts, mlp]"),
    "recompute.method": ("uniform", "block"),
    "recompute.num_layers": ("1", "2", "3"),
    "batch.micro_batch_seqs": ("1", "2", "4", "8"),
    "batch.global_batch_seqs": ("4", "8", "12", "16"),
    "batch.seq_length_tokens": ("16", "32", "33", "48"),
    "batch.ramp": ("{start_seqs: 4, increment_seqs: 4, samples: 8}",),
    "data.document_mask": ("true",),
    "data.mask_eod_loss": ("true",),
    "data.packing": ("best_fit",),
    "schedule.kind": ("cosine", "linear", "wsd", "constant"),
    "optimizer.clip_grad_norm": ("0", "0.1"),
    "optimizer.weight_decay": ("0",),
    "checkpoint.interval_steps": ("1", "null"),
    "checkpoint.asynchronous": ("false",),
    "run.eval_interval_steps": ("1", "2"),
    "divergence.spike": ("skip", "rollback"),
    "model.num_layers": ("1", "2", "3", "4"),
    "model.hidden_size": ("24", "32", "36", "50"),
    "model.ffn_hidden_size": ("40", "66", "null"),
    "model.vocab_multiple": ("1", "8", "37"),
    "model.activation": ("swiglu", "geglu", "gpt_oss_glu", "gelu", "relu2", "silu"),
    "model.mlp_bias": ("true",),
    "model.norm": ("layernorm",),
    "model.norm_position": ("after",),
    "model.tie_embeddings": ("true",),
    "model.hidden_dropout": ("0.1",),
    "model.max_position_tokens": ("32", "64"),
    "model.scale_init_by_depth": ("false",),
    "model.attention.num_heads": ("1", "2", "4", "6"),
    "model.attention.num_query_groups": ("1", "2", "null"),
    "model.attention.head_dim": ("null", "6", "8", "10"),
    "model.attention.qk_norm": ("true",),
    "model.attention.qk_norm_span": ("all_heads",),
    "model.attention.qk_norm_after_rotation": ("true",),
    "model.attention.qk_l2_norm": ("true",),
    "model.attention.temperature_growth": ("0.4",),
    "model.attention.temperature_step_tokens": ("3",),
    "model.attention.qkv_bias": ("true",),
    "model.attention.output_bias": ("true",),
    "model.attention.window_size_tokens": ("1", "5", "40"),
    "model.attention.window_kind": ("chunked",),
    "model.attention.window_layers": ("alternate",),
    "model.attention.window_pattern": ("[1, 0]", "[0, 1, 1]"),
    "model.attention.sinks": ("true",),
    "model.attention.dropout": ("0.1",),
    "model.mla": (MLA, MLA[:-1] + ", q_lora_rank: 12}", MLA[:-1] + ", norm_eps: 1e-6}"),
    "model.position.kind": ("learned", "none"),
    "model.position.rotary_fraction": ("0.5", "0.25"),
    "model.position.interleaved": ("true",),
    "model.position.layer_pattern": ("[1, 0]", "[0, 1, 1]"),
    "model.position.scaling": (YARN, "{kind: linear, factor: 2}", "{kind: llama3, factor: 8, original_max_position: 99}",
                               "{kind: linear, factor: 2, layers: full_attention}"),
    "model.moe.num_experts": ("0", "2", "4", "6", "8"),
    "model.moe.top_k": ("1", "2", "3"),
    "model.moe.ffn_hidden_size": ("null", "20", "30"),
    "model.moe.first_dense_layers": ("1",),
    "model.moe.layer_frequency": ("2",),
    "model.moe.layer_pattern": ("[0, 1]", "[1, 0, 1]", "[1, 0, 1, 0]"),
    "model.moe.shared_ffn_hidden_size": ("24", "33"),
    "model.moe.weights_on_input": ("true",),
    "model.moe.shared_gate": ("true",),
    "model.moe.shared_overlap": ("true",),
    "model.moe.capacity_factor": ("0.1", "0.5", "1.5", "5"),
    "model.moe.pad_to_capacity": ("true",),
    "model.moe.drop_policy": ("position",),
    "model.moe.dispatcher": ("alltoall", "allgather"),
    "model.moe.grouped_gemm": ("on", "off"),
    "model.moe.router.score": ("sigmoid",),
    "model.moe.router.normalize_top_k": ("false",),
    "model.moe.router.scaling_factor": ("2.5",),
    "model.moe.router.bias": ("true",),
    "model.moe.router.num_groups": ("2",),
    "model.moe.router.group_top_k": ("1", "2"),
    "model.moe.router.expert_bias": ("true",),
    "model.moe.router.balance": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "model.moe.router.aux_loss_coeff": ("0", "0.1"),
    "model.moe.router.z_loss_coeff": ("0.01",),
    "model.moe.router.jitter_eps": ("0.1",),
    "model.mtp.num_layers": ("1", "2"),
    "model.mtp.loss_coeff": ("0.7",),
    "model.mup.base_hidden_size": ("16", "64"),
    "model.attention.output_gate": ("true",),
    "optimizer.muon.split_heads": ("none", "head"),
    "optimizer.muon.split_gate": ("false",),
    "optimizer.muon.scale": ("spectral",),
    "optimizer.muon.router": ("muon",),
    "optimizer.muon.nesterov": ("false",),
    "optimizer.muon.ns_coefficients": ("quintic",),
    "metrics.expert_load_layers": ("0", "2"),
    "metrics.profile.start_step": ("2",),
}  # fmt: skip

# Keys that are legal, or mean something, together only: each comes up in one of six configs.
BUNDLES: tuple[dict[str, tuple[str, ...]], ...] = (
    {"model.mlp_bias": ("true",), "model.attention.qkv_bias": ("true",), "model.attention.output_bias": ("true",)},
    {
        "model.mlp_bias": ("true",), "model.attention.qkv_bias": ("true",), "model.attention.output_bias": ("true",),
        "model.moe.router.bias": ("true",), "model.activation": ("gpt_oss_glu",), "model.attention.sinks": ("true",),
        "model.attention.window_size_tokens": ("5",),
    },
    {
        "model.mla": VALUES["model.mla"], "model.attention.num_query_groups": ("null",), "model.attention.head_dim": ("null",),
        "model.attention.qk_norm": ("false",),
    },
    {"model.moe.router.score": ("sigmoid",), "model.moe.router.expert_bias": ("true",)},
    {
        "model.moe.router.num_groups": ("2",), "model.moe.router.group_top_k": ("1", "2"),
        "model.moe.router.group_score_experts": ("null", "1"),
    },
    {"model.moe.shared_ffn_hidden_size": ("24", "33"), "model.moe.shared_gate": ("true", "false")},
    {"model.moe.shared_ffn_hidden_size": ("24",), "model.moe.shared_overlap": ("true",)},
    {"model.moe.capacity_factor": ("0.1", "0.5", "1.5"), "model.moe.pad_to_capacity": ("true",)},
    {"parallel.pipeline": ("2",), "parallel.virtual_pipeline": ("2",), "model.num_layers": ("4",)},
    {"parallel.pipeline": ("2",), "model.tie_embeddings": ("true",), "model.mtp.num_layers": ("1",)},
    {"parallel.tensor": ("2",), "parallel.expert": ("2",), "parallel.expert_tensor": ("1", "2")},
    {"zero.engine": ("deepspeed",), "zero.stage": ("1", "2", "3"), "zero.offload": ("none", "optimizer")},
    {"zero.engine": ("deepspeed",), "zero.stage": ("3",), "zero.offload": ("none", "param")},
    {"precision.params": ("bf16",), "precision.grads": ("fp32", "bf16")},
    {"recompute.mode": ("selective",), "recompute.modules": VALUES["recompute.modules"]},
    {"optimizer.kind": ("muon",), "optimizer.muon.ns_dtype": ("fp32",)},
    {"optimizer.kind": ("muon",), "optimizer.muon.ns_dtype": ("fp32",), "optimizer.muon.qk_clip": ("0.05",)},
    {"model.delta_net": (DELTA,), "model.norm": ("zero_centered_rmsnorm",), "model.attention.output_gate": ("true", "false")},
    {"model.moe.num_experts": ("0",), "parallel.sequence": ("true", "false"), "parallel.tensor": ("2",)},
)  # fmt: skip

# Axes of the layout come up more often than other keys.
_AXES = ("launch", "parallel", "zero")


def random_config(seed: int, data: Path | None, base: tuple[str, ...] = ()) -> tuple[list[str], Config]:
    """(words over quickstart, config) of a config that `check` passes. `data`: the folder of a tokenizer and a corpus."""
    generator = random.Random(seed)
    fixed = [*BASE, *base, *(data_words(data) if data else ("model.vocab_size=300",))]
    keys = [key for key in VALUES if generator.random() < (0.2 if key.startswith(_AXES) else 0.08)]
    words = {key: generator.choice(VALUES[key]) for key in keys}
    for bundle in BUNDLES:
        if generator.random() < 0.17:
            words |= {key: generator.choice(values) for key, values in bundle.items()}
    while True:
        config, refused = _problems_of([*fixed, *(f"{key}={value}" for key, value in words.items())], data is not None)
        if config is not None and not refused:
            return [*fixed, *(f"{key}={value}" for key, value in words.items())], config
        # One that is blamed goes, or another that may be the reason for it.
        blamed = [key for key in words if any(path.startswith(key) or key.startswith(path) for path in refused)]
        words.pop(generator.choice(blamed or list(words)))


def data_words(data: Path) -> tuple[str, ...]:
    return (f"data.tokenizer.path={data / 'tok.model'}", f"data.train=[{{path: {data / 'embedded'}}}]")


def _problems_of(words: list[str], with_data: bool) -> tuple[Config | None, list[str]]:
    """(config when it loads, paths of its problems)."""
    try:
        config = load_config("quickstart", words).config
    except ConfigError as error:
        return None, [problem.path for problem in error.problems]
    # A millisecond; the whole preflight takes a hundred.
    problems = check_config(config).problems or preflight(config, with_data).problems
    return config, [problem.path for problem in problems]


def configs(first_seed: int, count: int, data: Path | None) -> Iterator[tuple[int, list[str], Config]]:
    """(seed, words, config) of `count` seeds."""
    for seed in range(first_seed, first_seed + count):
        words, config = random_config(seed, data)
        yield seed, words, config
