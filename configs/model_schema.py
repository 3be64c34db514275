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
    num_heads: int = key(8, "Number of query heads.", low=1, high=65536)
    num_query_groups: Optional[int] = key(
        None,
        "Number of key/value heads (grouped-query attention). null: one for each query head; 1: multi-query attention.",
        low=1,
    )
    head_dim: Optional[int] = key(None, "Width of one head. null: hidden_size / num_heads.", low=1)
    qk_norm: bool = key(False, "RMSNorm on queries and keys.")
    qk_norm_span: str = key(
        "head",
        "Span of that norm. head: each head by itself; all_heads: all heads of the layer together (OLMoE, MiniMax-M2).",
        choices=("head", "all_heads"),
    )
    qk_norm_after_rotation: bool = key(
        False, "That norm follows the rotation of queries and keys (Hunyuan), else it comes before."
    )
    qk_l2_norm: bool = key(
        False,
        "Rotated layers divide queries and keys by their root mean square, after the rotation and without a weight (Llama 4).",
    )
    qkv_bias: bool = key(False, "Bias of the query, key and value projections.")
    output_bias: bool = key(False, "Bias of the output projection.")
    window_size_tokens: Optional[int] = key(
        None,
        "Sliding window in tokens: a query attends to itself and to window - 1 tokens before it. null: full attention.",
        low=1,
    )
    window_kind: str = key(
        "sliding",
        "sliding: the window moves with the query. chunked: sequences are cut into chunks of that many tokens, and a query attends to "
        "the tokens of its chunk up to itself (Llama 4).",
        choices=("sliding", "chunked"),
    )
    window_layers: str = key(
        "all", "Layers that have the window. alternate: layers 0, 2, 4 and so on.", choices=("all", "alternate")
    )
    window_pattern: Optional[List[int]] = key(
        None, "For each layer 1 (window) or 0 (full attention), instead of window_layers.", low=0, high=1
    )
    sinks: bool = key(False, "One learned logit per head takes part in the softmax (gpt-oss).")
    temperature_growth: float = key(
        0.0,
        "In layers without positions (position.layer_pattern) the query at position p, from 0, is multiplied by 1 + growth x "
        "ln(1 + floor((p + 1) / temperature_step_tokens)) (Llama 4: 0.1). 0: off.",
        low=0,
    )
    temperature_step_tokens: int = key(8192, "Tokens between two steps of that factor.", low=1)
    output_gate: bool = key(
        False, "Sigmoid gate on the output of each head, computed from the layer's input with the queries (Qwen3-Next)."
    )
    dropout: float = key(0.0, "Dropout probability of attention weights.", low=0, high=0.99)


@dataclass
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). Off while kv_lora_rank is None."""

    kv_lora_rank: Optional[int] = key(None, "Width of the compressed keys and values. null: ordinary attention.", low=1)
    q_lora_rank: Optional[int] = key(None, "Width of the compressed queries. null: queries are not compressed.", low=1)
    qk_nope_head_dim: int = key(128, "Width of the part of a query or key head that is not rotated.", low=1)
    qk_rope_head_dim: int = key(64, "Width of the rotated part of a query or key head.", low=2)
    v_head_dim: int = key(128, "Width of a value head.", low=1)
    norm_eps: Optional[float] = key(
        None, "Epsilon of the norms of compressed queries and keys (DeepSeek: 1e-6). null: model.norm_eps.", above=0
    )


@dataclass
class SparseAttention:
    """DeepSeek sparse attention (DeepSeek-V3.2, arXiv 2512.02556): an indexer chooses the keys of each query. Off while top_k is
    None.
    """

    top_k: Optional[int] = key(
        None, "Keys that a query attends to: those of its largest index scores. null: every key. For planning only.", low=1
    )
    num_index_heads: int = key(64, "Query heads of the indexer. They share one key.", low=1, high=65536)
    index_head_dim: int = key(128, "Width of a head of the indexer.", low=1)
    index_dtype: str = key("fp8", "Number format in which a run computes the index scores.", choices=("fp8", "bf16"))


@dataclass
class DeltaNet:
    """Gated delta net (arXiv 2412.06464): layers with a recurrent state in the place of attention. Off while pattern is None."""

    pattern: Optional[List[int]] = key(
        None,
        "For each layer 1 (gated delta net) or 0 (attention). A shorter list repeats. null: every layer has attention.",
        low=0,
        high=1,
    )
    num_key_heads: int = key(16, "Number of query and key heads.", low=1, high=65536)
    num_value_heads: int = key(32, "Number of value heads. Each has a state of key_head_dim x value_head_dim.", low=1, high=65536)
    key_head_dim: int = key(128, "Width of a query or key head.", low=1)
    value_head_dim: int = key(128, "Width of a value head.", low=1)
    conv_size_tokens: int = key(
        4, "Tokens that the causal convolution over queries, keys and values spans, the token's own included.", low=2, high=16
    )


@dataclass
class RopeScaling:
    """Stretching of the rotary frequencies. `linear` is position interpolation, `llama3` and `yarn` as in the HF configs."""

    kind: str = key(
        "none",
        "Method of scaling: linear (position interpolation), llama3 or yarn, as in Hugging Face configs.",
        choices=("none", "linear", "llama3", "yarn"),
    )
    layers: str = key(
        "all",
        "Layers whose frequencies are scaled. full_attention: those without a window only (OLMo-3).",
        choices=("all", "full_attention"),
    )
    factor: float = key(1.0, "Factor by which the context length grows.", low=1)
    original_max_position: int = key(4096, "Context length before scaling, in tokens.", low=1)
    low_freq_factor: float = key(
        1.0, "llama3: lower bound of the blended frequencies, as original_max_position over the wavelength.", above=0
    )
    high_freq_factor: float = key(
        4.0, "llama3: upper bound of the blended frequencies, as original_max_position over the wavelength.", above=0
    )
    beta_fast: float = key(32.0, "yarn: frequencies with more rotations than this over the original context are kept.", above=0)
    beta_slow: float = key(
        1.0, "yarn: frequencies with fewer rotations than this over the original context are fully interpolated.", above=0
    )
    mscale: float = key(1.0, "yarn: weight of the attention temperature.", low=0)
    mscale_all_dim: float = key(0.0, "yarn: weight of the attention temperature over all dims (DeepSeek).", low=0)
    truncate: bool = key(True, "yarn: round the bounds of the corrected dims to whole dims (gpt-oss: false).")


@dataclass
class Position:
    kind: str = key("rope", "Kind of positions: rotary, learned absolute, or none.", choices=("rope", "learned", "none"))
    theta: float = key(10000.0, "Base of the rotary frequencies.", above=0)
    rotary_fraction: float = key(1.0, "Share of each head that is rotated.", above=0, high=1)
    interleaved: bool = key(
        False, "Rotate neighbouring dims as pairs, instead of a dim of the first half with one of the second."
    )
    layer_pattern: Optional[List[int]] = key(
        None, "For each layer 1 (rotated) or 0 (no positions: SmolLM3, EXAONE-MoE). null: all are rotated.", low=0, high=1
    )
    scaling: RopeScaling = key(factory=RopeScaling)


@dataclass
class Router:
    score: str = key("softmax", "Function that turns router logits into scores of the experts.", choices=("softmax", "sigmoid"))
    normalize_top_k: bool = key(True, "Weights of a token's chosen experts sum to 1 (norm_topk_prob).")
    scaling_factor: float = key(1.0, "Factor on the weights of the chosen experts (routed_scaling_factor).", above=0)
    bias: bool = key(False, "Learned bias on the router logits (gpt-oss).")
    num_groups: Optional[int] = key(
        None, "Number of groups that the experts form for group-limited routing. null: no groups.", low=1
    )
    group_top_k: Optional[int] = key(None, "Number of groups that a token may choose experts from.", low=1)
    group_score_experts: Optional[int] = key(
        None, "Best experts whose scores add up to the score of their group. null: top_k / group_top_k (Megatron-Core).", low=1
    )
    expert_bias: bool = key(
        False, "Bias on the selection scores that moves against the load, without gradient (DeepSeek-V3, arXiv 2408.15664)."
    )
    expert_bias_update_rate: float = key(1e-3, "Amount by which the selection bias moves in one step.", low=0)
    balance: str = key(
        "aux_loss",
        "Load balancing loss: over each micro-batch (aux_loss), each sequence, or the global batch.",
        choices=("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    )
    aux_loss_coeff: float = key(1e-3, "Weight of the load balancing loss.", low=0)
    z_loss_coeff: float = key(0.0, "Weight of the router z-loss (ST-MoE, arXiv 2202.08906).", low=0)
    jitter_eps: float = key(
        0.0,
        "The router's input is multiplied by noise from uniform(1 - eps, 1 + eps). The noise depends on the layout.",
        low=0,
        high=0.5,
    )


@dataclass
class MoE:
    num_experts: int = key(0, "Routed experts of one MoE layer. 0: a dense model.", low=0, high=65536)
    top_k: int = key(2, "Experts that process each token.", low=1, high=65536)
    ffn_hidden_size: Optional[int] = key(
        None, "Inner width of one routed expert. null: model.ffn_hidden_size.", low=1, high=2**24
    )
    first_dense_layers: int = key(0, "Number of layers at the bottom that are dense.", low=0)
    layer_frequency: int = key(1, "Above the dense ones, layers whose index is a multiple of this are MoE layers.", low=1)
    layer_pattern: Optional[List[int]] = key(
        None, "For each layer 1 (MoE) or 0 (dense), instead of first_dense_layers and layer_frequency.", low=0, high=1
    )
    shared_ffn_hidden_size: Optional[int] = key(
        None, "Inner width of all shared experts together. null: no shared expert.", low=1
    )
    weights_on_input: bool = key(
        False, "The weight of the chosen expert multiplies its input, not its output (Llama 4). Needs top_k = 1."
    )
    shared_gate: bool = key(False, "Sigmoid gate on the output of the shared expert (Qwen2-MoE).")
    shared_overlap: bool = key(
        False, "Compute the shared expert while tokens are sent to routed ones. Needs dispatcher = alltoall."
    )
    router: Router = key(factory=Router)
    capacity_factor: Optional[float] = key(
        None, "Most tokens of an expert, as a multiple of the even share; others are dropped. null: no token is dropped.", above=0
    )
    pad_to_capacity: bool = key(False, "Pad the input of every expert to its capacity.")
    drop_policy: str = key(
        "probs",
        "Tokens that are dropped when an expert is full: those of lowest probability, or the last ones.",
        choices=("probs", "position"),
    )
    dispatcher: str = key(
        "alltoall",
        "How tokens are sent to experts on other ranks. flex: DeepEP or HybridEP.",
        choices=("alltoall", "allgather", "flex"),
    )
    grouped_gemm: str = key(
        "auto",
        "One grouped matrix product for all local experts. auto: where it is exact and faster.",
        choices=("auto", "on", "off"),
    )


@dataclass
class MultiToken:
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437)."""

    num_layers: int = key(0, "Number of additional prediction depths after the last layer.", low=0, high=64)
    loss_coeff: float = key(0.1, "Weight of the mean loss of the prediction depths.", low=0)


@dataclass
class WidthTransfer:
    """Maximal update parametrization (muP; Yang et al., arXiv 2203.03466): values tuned at one width hold at others."""

    base_hidden_size: Optional[int] = key(
        None,
        "hidden_size at which init_std and optimizer.lr were tuned. Wider models start and learn by muP's rules for Adam. null: off.",
        low=1,
        high=2**20,
    )


@dataclass
class Model:
    name: str = key("custom", "Name of the model, for people only.")
    source: str = key("", "Source of the values: a paper or a config file.")
    planning_only: str = key("", "Why this model can be counted and planned but not trained. Empty: it can be trained.")
    vocab_size: Optional[int] = key(
        None, "Number of tokens in the vocabulary. null: as many as the tokenizer has.", low=1, high=2**31 - 1
    )
    vocab_multiple: int = key(
        128, "The vocabulary is padded to a multiple of this, for every layout. Logits of the padding are masked.", low=1
    )
    num_layers: int = key(4, "Transformer layers, without the depths of multi-token prediction.", low=1, high=4096)
    hidden_size: int = key(64, "Width of the residual stream.", low=1, high=2**20)
    ffn_hidden_size: Optional[int] = key(None, "Inner width of dense MLPs. null: 4 x hidden_size.", low=1, high=2**24)
    activation: str = key(
        "swiglu",
        "Activation function of MLPs and experts. swiglu, geglu and gpt_oss_glu are gated.",
        choices=("swiglu", "geglu", "gpt_oss_glu", "gelu", "relu2", "silu"),
    )
    mlp_bias: bool = key(False, "Biases of MLPs and experts.")
    norm: str = key(
        "rmsnorm",
        "Kind of normalisation. zero_centered_rmsnorm: RMSNorm whose weight w multiplies by 1 + w (Qwen3-Next).",
        choices=("rmsnorm", "layernorm", "zero_centered_rmsnorm"),
    )
    norm_position: str = key(
        "before",
        "A layer's norms stand before attention and MLP, on what they read, or after, on what they add (OLMo-2, EXAONE 4).",
        choices=("before", "after"),
    )
    norm_eps: float = key(1e-5, "Epsilon of the norms.", above=0)
    tie_embeddings: bool = key(False, "The output layer shares the weights of the input embedding.")
    hidden_dropout: float = key(0.0, "Dropout probability after attention and after the MLP.", low=0, high=0.99)
    max_position_tokens: Optional[int] = key(
        None,
        "Longest sequence that the positions support, in tokens. null: batch.seq_length_tokens. Learned positions need it.",
        low=1,
    )
    init_std: float = key(0.02, "Standard deviation of initial weights.", above=0)
    scale_init_by_depth: bool = key(True, "Output projections start with standard deviation init_std / sqrt(2 x num_layers).")
    attention: Attention = key(factory=Attention)
    mla: LatentAttention = key(factory=LatentAttention)
    dsa: SparseAttention = key(factory=SparseAttention)
    delta_net: DeltaNet = key(factory=DeltaNet)
    position: Position = key(factory=Position)
    moe: MoE = key(factory=MoE)
    mtp: MultiToken = key(factory=MultiToken)
    mup: WidthTransfer = key(factory=WidthTransfer)
