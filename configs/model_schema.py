"""The `model` section: the architecture, nothing about how it is run. Lengths in tokens, widths in elements.

Megatron-Core's TransformerConfig is the vocabulary's origin; one section per idea keeps names short.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

from configs.fields import key


@dataclass
class Attention:
    num_heads: int = key(8, "query heads", low=1, high=65536)
    num_query_groups: Optional[int] = key(None, "key/value heads (GQA); None: as many as query heads, 1: MQA", low=1)
    head_dim: Optional[int] = key(None, "width of one head; None: hidden_size / num_heads", low=1)
    qk_norm: bool = key(False, "RMSNorm on each head's query and key")
    qk_norm_span: str = key(
        "head", "what such a norm spans; all_heads (OLMoE) is for planning only", choices=("head", "all_heads")
    )
    qkv_bias: bool = key(False, "bias on the query, key and value projections")
    output_bias: bool = key(False, "bias on the output projection")
    window_size_tokens: Optional[int] = key(None, "sliding window: a query sees itself and the window-1 tokens before it", low=1)
    window_layers: str = key(
        "all", "layers with the window; alternate: even layers (0, 2, …) have it", choices=("all", "alternate")
    )
    window_pattern: Optional[List[int]] = key(
        None, "explicit: 1 window, 0 full attention, one a layer; replaces window_layers", low=0, high=1
    )
    sinks: bool = key(False, "one learned logit a head joins the softmax (gpt-oss)")
    dropout: float = key(0.0, "dropout of attention probabilities", low=0, high=0.99)


@dataclass
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). Off while kv_lora_rank is None."""

    kv_lora_rank: Optional[int] = key(None, "width of the compressed key/value; None: ordinary attention", low=1)
    q_lora_rank: Optional[int] = key(None, "width of the compressed query; None: queries are not compressed", low=1)
    qk_nope_head_dim: int = key(128, "width of a head's query/key part without rotation", low=1)
    qk_rope_head_dim: int = key(64, "width of a head's rotated query/key part", low=2)
    v_head_dim: int = key(128, "width of a head's value", low=1)
    norm_eps: Optional[float] = key(
        None, "epsilon of the norms of compressed query and key (DeepSeek: 1e-6); None: model.norm_eps", above=0
    )


@dataclass
class RopeScaling:
    """Stretching of the rotary frequencies. `linear` is position interpolation, `llama3` and `yarn` as in the HF configs."""

    kind: str = key("none", "none, linear, llama3 or yarn", choices=("none", "linear", "llama3", "yarn"))
    factor: float = key(1.0, "stretch of the context length", low=1)
    original_max_position: int = key(4096, "context length before stretching, in tokens", low=1)
    low_freq_factor: float = key(1.0, "llama3: lower bound of the blended wave lengths", above=0)
    high_freq_factor: float = key(4.0, "llama3: upper bound of the blended wave lengths", above=0)
    beta_fast: float = key(32.0, "yarn: rotations above which a frequency is kept", above=0)
    beta_slow: float = key(1.0, "yarn: rotations below which a frequency is fully interpolated", above=0)
    mscale: float = key(1.0, "yarn: weight of the attention temperature", low=0)
    mscale_all_dim: float = key(0.0, "yarn: weight of the temperature over all dims (DeepSeek)", low=0)
    truncate: bool = key(True, "yarn: round the correction range to whole dims (gpt-oss: false)")


@dataclass
class Position:
    kind: str = key("rope", "rotary, learned absolute, or none", choices=("rope", "learned", "none"))
    theta: float = key(10000.0, "rotary base", above=0)
    rotary_fraction: float = key(1.0, "part of each head that is rotated", above=0, high=1)
    interleaved: bool = key(False, "rotate neighbouring pairs instead of halves")
    scaling: RopeScaling = key(factory=RopeScaling)


@dataclass
class Router:
    score: str = key("softmax", "how a token scores the experts", choices=("softmax", "sigmoid"))
    normalize_top_k: bool = key(True, "weights of the chosen experts sum to 1 (norm_topk_prob)")
    scaling_factor: float = key(1.0, "factor on the chosen experts' weights (routed_scaling_factor)", above=0)
    bias: bool = key(False, "learned bias on the router's logits (gpt-oss)")
    num_groups: Optional[int] = key(None, "experts are divided into this many groups (group-limited routing)", low=1)
    group_top_k: Optional[int] = key(None, "groups that a token may use", low=1)
    expert_bias: bool = key(False, "selection bias moved against the load, without gradient (DeepSeek-V3, arXiv 2408.15664)")
    expert_bias_update_rate: float = key(1e-3, "step of the selection bias", low=0)
    balance: str = key(
        "aux_loss",
        "load balancing loss: over the micro-batch, each sequence, the global batch, or none",
        choices=("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    )
    aux_loss_coeff: float = key(1e-3, "weight of the load balancing loss", low=0)
    z_loss_coeff: float = key(0.0, "weight of the router z-loss (ST-MoE, arXiv 2202.08906)", low=0)
    jitter_eps: float = key(0.0, "router input times uniform(1-eps, 1+eps); depends on the layout by nature", low=0, high=0.5)


@dataclass
class MoE:
    num_experts: int = key(0, "routed experts a MoE layer; 0: a dense model", low=0, high=65536)
    top_k: int = key(2, "experts a token uses", low=1, high=65536)
    ffn_hidden_size: Optional[int] = key(None, "inner width of one expert; None: model.ffn_hidden_size", low=1, high=2**24)
    first_dense_layers: int = key(0, "this many layers at the bottom stay dense", low=0)
    layer_frequency: int = key(1, "after those, each layer whose index is a multiple of this is MoE", low=1)
    layer_pattern: Optional[List[int]] = key(
        None, "explicit: 1 MoE, 0 dense, one a layer; replaces the two keys above", low=0, high=1
    )
    shared_ffn_hidden_size: Optional[int] = key(None, "inner width of all shared experts together; None: no shared expert", low=1)
    shared_gate: bool = key(False, "sigmoid gate on the shared expert (Qwen2-MoE)")
    shared_overlap: bool = key(False, "run the shared expert while tokens travel (all-to-all dispatcher)")
    router: Router = key(factory=Router)
    capacity_factor: Optional[float] = key(
        None, "tokens an expert takes, as a multiple of the even share; None: dropless", above=0
    )
    pad_to_capacity: bool = key(False, "pad every expert's input to its capacity")
    drop_policy: str = key("probs", "which tokens go when an expert is full", choices=("probs", "position"))
    dispatcher: str = key("alltoall", "how tokens reach their experts", choices=("alltoall", "allgather", "flex"))
    grouped_gemm: str = key(
        "auto", "one product for all local experts; auto: where it is exact and faster", choices=("auto", "on", "off")
    )


@dataclass
class MultiToken:
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437)."""

    num_layers: int = key(0, "extra prediction depths after the last layer", low=0, high=64)
    loss_coeff: float = key(0.1, "weight of the mean extra loss", low=0)


@dataclass
class Model:
    name: str = key("custom", "a label, for people")
    source: str = key("", "where the values come from")
    planning_only: str = key("", "why this preset can be counted and planned but not built; empty: it can be trained")
    vocab_size: Optional[int] = key(None, "tokens; None: as many as the tokenizer has", low=1, high=2**31 - 1)
    vocab_multiple: int = key(128, "the table is padded to a multiple of this, whatever the layout; pads are masked", low=1)
    num_layers: int = key(4, "transformer layers, multi-token prediction not counted", low=1, high=4096)
    hidden_size: int = key(64, "width of the residual stream", low=1, high=2**20)
    ffn_hidden_size: Optional[int] = key(None, "inner width of dense layers; None: 4 x hidden_size", low=1, high=2**24)
    activation: str = key(
        "swiglu", "of the MLP; the glu kinds are gated", choices=("swiglu", "geglu", "gpt_oss_glu", "gelu", "relu2", "silu")
    )
    mlp_bias: bool = key(False, "bias on the MLP's and experts' products")
    norm: str = key("rmsnorm", "normalisation", choices=("rmsnorm", "layernorm"))
    norm_eps: float = key(1e-5, "epsilon of every norm", above=0)
    tie_embeddings: bool = key(False, "output layer shares the input embedding")
    hidden_dropout: float = key(0.0, "dropout after attention and MLP", low=0, high=0.99)
    max_position_tokens: Optional[int] = key(
        None, "longest sequence the positions are made for; None: batch.seq_length_tokens", low=1
    )
    init_std: float = key(0.02, "standard deviation of initial weights", above=0)
    scale_init_by_depth: bool = key(True, "output projections start with init_std / sqrt(2 x num_layers)")
    attention: Attention = key(factory=Attention)
    mla: LatentAttention = key(factory=LatentAttention)
    position: Position = key(factory=Position)
    moe: MoE = key(factory=MoE)
    mtp: MultiToken = key(factory=MultiToken)
