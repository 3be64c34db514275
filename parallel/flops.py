"""Exact parameter counts and training FLOPs per token of a model, from its config alone.

In: configs' Model and the vocabulary (tokens, not padded: pads do no useful work). Out: `Parameters` and `Flops`.

FLOPs of one token, forward: 2 for each weight of a matrix product it passes (k of E experts, the router, shared experts,
the output head; the embedding is a look-up), and for attention 2·heads·(d_qk + d_v)·context, where context is the mean
number of keys a query sees: causal, so half the sequence, s/2; with a window of w < s tokens w - w²/2s; in chunks w/2. With
grouped queries every head still does its own products, so only the weights shrink. A gated delta net's state S [d_k, d_v] of
each value head meets one token in three products, with 6·d_k·d_v FLOPs: S^T k, the outer product of k and the correction, S^T q
(arXiv 2412.06464, eq. 10). Chunked kernels do more; that is not counted. With sparse attention a query meets at most top_k
keys, and the indexer has FLOPs of its own (`indexer_flops`). Backward costs twice the forward; recomputed
activations are not counted (model FLOPs). Norms, activations, softmax and the router's top-k are left out. Each
prediction depth (MTP) adds a layer, its 2h x h product and the head once more.

Torch-free.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from configs.model_schema import Model
from parallel import architecture as arch
from parallel.architecture import LayerKind


@dataclass(frozen=True)
class LayerParameters:
    """Weights of one layer by component; `routed` holds all experts."""

    attention: int
    norms: int
    dense: int = 0
    routed: int = 0
    shared: int = 0
    router: int = 0
    indexer: int = 0

    @property
    def total(self) -> int:
        return self.attention + self.norms + self.dense + self.routed + self.shared + self.router + self.indexer


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights. `total` has neither MTP nor buffers (expert_bias); a tied head is counted once, as embedding."""

    embedding: int
    head: int
    attention: int
    norms: int
    dense: int
    routed: int
    shared: int
    router: int
    indexer: int
    mtp: int
    routed_active: int
    tied: bool

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding + self.head

    @property
    def non_embedding(self) -> int:
        return self.attention + self.norms + self.dense + self.routed + self.shared + self.router + self.indexer

    @property
    def active(self) -> dict[str, int]:
        """Weights used by one token, in the three conventions: say which one."""
        every = self.total - self.routed + self.routed_active
        # A tied table also is the output head, so it stays when the input embedding is left out.
        return {
            "all": every,
            "without_input_embedding": every if self.tied else every - self.embedding,
            "non_embedding": every - self.embedding - self.head,
        }

    def as_dict(self) -> dict[str, object]:
        components = {name: value for name, value in asdict(self).items() if name not in ("tied", "routed_active")}
        return {"params_total": self.total, "params_active": self.active, "params_by_component": components}


def _norm(model: Model, width: int) -> int:
    return width * (2 if model.norm == "layernorm" else 1)


def _attention(model: Model) -> tuple[int, int]:
    """(weights, norm weights) of one layer's attention."""
    heads, groups, width = model.attention.num_heads, arch.num_query_groups(model), arch.head_dim(model)
    weights = arch.attention_products(model)
    if arch.is_mla(model):
        ranks = [rank for rank in (model.mla.q_lora_rank, model.mla.kv_lora_rank) if rank]
        weights += model.hidden_size if model.attention.output_bias else 0
        return weights, sum(_norm(model, rank) for rank in ranks)
    weights += arch.qkv_rows(model) if model.attention.qkv_bias else 0
    weights += model.hidden_size if model.attention.output_bias else 0
    weights += heads if model.attention.sinks else 0
    if not model.attention.qk_norm:
        return weights, 0
    return weights, 2 * width if model.attention.qk_norm_span == "head" else (heads + groups) * width


def _mlp_biases(model: Model, width: int) -> int:
    return (2 if arch.is_gated(model) else 1) * width + model.hidden_size if model.mlp_bias else 0


def _delta_net(model: Model) -> tuple[int, int]:
    """(weights, norm weights) of one layer's gated delta net: its products, decay and time step of each head, output norm."""
    return arch.delta_products(model) + 2 * model.delta_net.num_value_heads, model.delta_net.value_head_dim


def layer_parameters(model: Model, kind: LayerKind) -> LayerParameters:
    """Weights of one layer of the given kind."""
    attention, norms = _delta_net(model) if kind.delta else _attention(model)
    norms += 2 * _norm(model, model.hidden_size)
    moe, products = model.moe, arch.layer_products(model, kind)
    # The key of an indexer has a LayerNorm, weight and bias.
    norms += 2 * model.dsa.index_head_dim if products.indexer else 0
    if not kind.moe:
        dense = products.dense + _mlp_biases(model, arch.ffn(model))
        return LayerParameters(attention, norms, dense=dense, indexer=products.indexer)
    width = arch.expert_ffn(model)
    routed = moe.num_experts * (arch.mlp_products(model, width) + _mlp_biases(model, width))
    router = products.router + (moe.num_experts if moe.router.bias else 0)
    return LayerParameters(attention, norms, routed=routed, shared=products.shared, router=router, indexer=products.indexer)


def count_parameters(model: Model, vocab_size: int) -> Parameters:
    """Weights of the whole model for a vocabulary of `vocab_size` (give the padded size for the weights as stored)."""
    table = vocab_size * model.hidden_size
    positions = (model.max_position_tokens or 0) * model.hidden_size if model.position.kind == "learned" else 0
    layers = [layer_parameters(model, kind) for kind in arch.layer_kinds(model)]
    depth = layer_parameters(model, arch.mtp_kind(model)).total + 2 * model.hidden_size**2 + 3 * _norm(model, model.hidden_size)
    return Parameters(
        embedding=table + positions,
        head=0 if model.tie_embeddings else table,
        attention=sum(layer.attention for layer in layers),
        norms=sum(layer.norms for layer in layers) + _norm(model, model.hidden_size),
        dense=sum(layer.dense for layer in layers),
        routed=sum(layer.routed for layer in layers),
        shared=sum(layer.shared for layer in layers),
        router=sum(layer.router for layer in layers),
        indexer=sum(layer.indexer for layer in layers),
        mtp=model.mtp.num_layers * depth,
        routed_active=sum(layer.routed * model.moe.top_k // model.moe.num_experts for layer in layers if layer.routed),
        tied=model.tie_embeddings,
    )


@dataclass(frozen=True)
class Flops:
    """Training FLOPs of one token by component, forward and backward. `attention_scores` has those of recurrent states, too."""

    attention_weights: float
    attention_scores: float
    dense: float
    routed: float
    shared: float
    router: float
    indexer: float
    head: float
    mtp: float

    @property
    def per_token(self) -> float:
        return sum(asdict(self).values())


def mean_context(seq_length_tokens: int, window_tokens: int | None, chunked: bool = False) -> float:
    """Mean number of keys of a causal query: s/2, with a window w < s: w - w²/2s.

    `chunked`: the window is a chunk of w tokens: w/2, less what the last chunk of s mod w tokens lacks.
    """
    window = min(window_tokens or seq_length_tokens, seq_length_tokens)
    if chunked:
        whole, last = divmod(seq_length_tokens, window)
        return (whole * window**2 + last**2) / (2 * seq_length_tokens)
    return window - window**2 / (2 * seq_length_tokens)


def _scores(model: Model, seq_length_tokens: int, layer: int) -> float:
    """Forward FLOPs of one attention layer's scores and their sum over values, one token."""
    window, chunked = model.dsa.top_k or arch.window_of_layer(model, layer), model.attention.window_kind == "chunked"
    context = mean_context(seq_length_tokens, window, chunked)
    return 2 * model.attention.num_heads * (arch.query_dim(model) + arch.value_dim(model)) * context


def gathers_keys(model: Model, seq_length_tokens: int) -> bool:
    """Whether sparse attention is computed on gathered keys, in the multi-query form of latent attention.

    There the heads share keys as wide as the compressed ones, and values as wide as their part without positions, which is more
    work for each pair (arXiv 2512.02556, appendix A). On short sequences it is less work to compute all keys and mask some.
    """
    if not arch.is_sparse(model) or not model.mla.kv_lora_rank:
        return False
    gathered = (2 * model.mla.kv_lora_rank + model.mla.qk_rope_head_dim) * mean_context(seq_length_tokens, model.dsa.top_k)
    return gathered < (arch.query_dim(model) + arch.value_dim(model)) * mean_context(seq_length_tokens, None)


def index_pair_flops(model: Model) -> float:
    """Forward FLOPs of one index score, of one query and one key: a product of each head, and the weighted sum over heads."""
    return 2.0 * model.dsa.num_index_heads * (model.dsa.index_head_dim + 1)


def indexer_flops(model: Model, seq_length_tokens: int) -> float:
    """Training FLOPs of one indexer, one token; 0 without one.

    It scores every key that a query may see, forward. Its loss in sparse training is over the chosen keys (arXiv 2512.02556,
    eq. 4), so the backward pass meets those only. Its input carries no gradient, so its own products cost twice the forward.
    """
    if not arch.is_sparse(model):
        return 0.0
    chosen = mean_context(seq_length_tokens, model.dsa.top_k)
    scored = mean_context(seq_length_tokens, None) + 2 * chosen
    return 4.0 * arch.indexer_products(model) + index_pair_flops(model) * scored


def state_flops(model: Model) -> float:
    """Forward FLOPs of one gated delta net's states, one token."""
    net = model.delta_net
    return 6.0 * net.num_value_heads * net.key_head_dim * net.value_head_dim


def training_flops(model: Model, vocab_size: int, seq_length_tokens: int) -> Flops:
    """FLOPs of one token, three times the forward pass."""
    kinds = arch.layer_kinds(model)
    layers = [arch.layer_products(model, kind) for kind in kinds]
    scores = (state_flops(model) if kind.delta else _scores(model, seq_length_tokens, i) for i, kind in enumerate(kinds))
    head = 6.0 * model.hidden_size * vocab_size
    last = model.num_layers - 1
    indexer, inner = indexer_flops(model, seq_length_tokens), arch.layer_products(model, arch.mtp_kind(model))
    depth = 6 * (inner.total - inner.indexer + 2 * model.hidden_size**2)
    depth_scores = 3 * _scores(model, seq_length_tokens, last) + indexer
    return Flops(
        attention_weights=6.0 * sum(layer.attention for layer in layers),
        attention_scores=3 * sum(scores),
        dense=6.0 * sum(layer.dense for layer in layers),
        routed=6.0 * sum(layer.routed for layer in layers),
        shared=6.0 * sum(layer.shared for layer in layers),
        router=6.0 * sum(layer.router for layer in layers),
        indexer=indexer * sum(not kind.delta for kind in kinds),
        head=head,
        mtp=model.mtp.num_layers * (depth + depth_scores + head),
    )
