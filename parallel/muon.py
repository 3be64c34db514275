"""Which parameters Muon updates, and the matrices inside each of them. Canonical names decide, so no layout changes it.

In: canonical names and shapes (pretrain/model/shards.py). Out: whether Muon updates a tensor, and its matrices as runs of rows.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable

from configs.model_schema import Model
from configs.optimizer_schema import Muon, Optimizer
from parallel import architecture as arch

# Runs of rows [start, stop) of one canonical matrix, which make one matrix of Muon.
RowRuns = tuple[tuple[int, int], ...]


def updates_with_muon(name: str, shape: tuple[int, ...], optimizer: Optimizer) -> bool:
    """Whether Muon updates this canonical tensor: a weight of a matrix product between the embedding and the output layer."""
    if optimizer.kind != "muon" or not name.endswith(".weight") or name.startswith(("embedding.", "output_layer.")):
        return False
    if name.endswith(".router.weight") and optimizer.muon.router != "muon":
        return False
    # Experts are stacked: [experts, rows, columns]. Other tensors of three dims are convolutions.
    num_dims = 3 if ".mlp.experts." in name else 2
    return len(shape) == num_dims and min(shape[-2:]) > 1


def split_rows(name: str, num_rows: int, model: Model, muon: Muon) -> list[RowRuns]:
    """The matrices of one canonical matrix [num_rows, columns], each as runs of rows. They partition its rows."""
    if name.endswith("linear_fc1.weight") and arch.is_gated(model) and muon.split_gate:
        return _pieces([num_rows // 2] * 2, num_rows)
    if muon.split_heads == "none":
        return [((0, num_rows),)]
    if name.endswith("linear_qkv.weight"):
        return _split_qkv(num_rows, model, muon.split_heads == "head")
    if name.endswith("self_attention.linear_in.weight"):
        return _split_delta_net(num_rows, model, muon.split_heads == "head")
    if muon.split_heads == "head" and arch.is_mla(model):
        return _split_latent(name, num_rows, model)
    return [((0, num_rows),)]


def _split_qkv(num_rows: int, model: Model, per_head: bool) -> list[RowRuns]:
    """Rows lie by group of query heads: the group's query heads, their output gates where there are any, its key, its value."""
    groups, width = arch.num_query_groups(model), arch.head_dim(model)
    queries = model.attention.num_heads // groups
    counts = [queries, *([queries] if model.attention.output_gate else []), 1, 1]
    heads = _pieces([width] * (groups * sum(counts)), num_rows)
    return heads if per_head else _joined(heads, counts)


def _split_delta_net(num_rows: int, model: Model, per_head: bool) -> list[RowRuns]:
    """Rows lie by key head: its query, its key, its values, their gates, and two numbers for each value head.

    Those numbers are one matrix each, over all heads.
    """
    net = model.delta_net
    ratio = net.num_value_heads // net.num_key_heads
    widths = [net.key_head_dim] * 2 + [net.value_head_dim] * (2 * ratio) + [ratio] * 2
    counts = [1, 1, ratio, ratio, 1, 1]
    heads = _pieces(widths * net.num_key_heads, num_rows)
    if not per_head:
        return _joined(heads, counts)
    single = [run for at, run in enumerate(heads) if at % len(widths) < len(widths) - 2]
    return single + _joined(heads, counts)[-2:]


def _joined(pieces: list[RowRuns], counts: list[int]) -> list[RowRuns]:
    """The pieces of one kind of all groups as one matrix. `counts`: pieces of each kind in a group."""
    found, start, size = [], 0, sum(counts)
    for count in counts:
        kind = [piece for at, piece in enumerate(pieces) if start <= at % size < start + count]
        found.append(tuple(run for piece in kind for run in piece))
        start += count
    return found


def _split_latent(name: str, num_rows: int, model: Model) -> list[RowRuns]:
    """Each head's rows of an up projection; keys apart from values."""
    heads, mla = model.attention.num_heads, model.mla
    if name.endswith(("linear_q_up_proj.weight", "linear_q_proj.weight")):
        return _pieces([arch.query_dim(model)] * heads, num_rows)
    if name.endswith("linear_kv_up_proj.weight"):
        return _pieces([mla.qk_nope_head_dim, mla.v_head_dim] * heads, num_rows)
    return [((0, num_rows),)]


def _pieces(lengths: Iterable[int], num_rows: int) -> list[RowRuns]:
    found, start = [], 0
    for length in lengths:
        found.append(((start, start + length),))
        start += length
    assert start == num_rows, f"the parts have {start} rows, the matrix has {num_rows}"
    return found


def newton_schulz_flops(rows: int, columns: int, steps: int) -> float:
    """FLOPs of Newton-Schulz on a matrix: each step multiplies X Xᵀ, its square, and the result with X."""
    short, long = min(rows, columns), max(rows, columns)
    return steps * (4.0 * short * short * long + 2.0 * short**3)


def layer_matrices(model: Model, kind: arch.LayerKind, optimizer: Optimizer) -> tuple[int, int]:
    """(dense weights, routed experts' weights) of one layer that Muon updates under optimizer.kind = muon."""
    products, moe = arch.layer_products(model, kind), model.moe
    gate = model.hidden_size if kind.moe and moe.shared_gate else 0
    convolution = model.delta_net.conv_size_tokens * arch.delta_widths(model).mixed if kind.delta else 0
    dense = products.attention + products.indexer + products.dense + products.shared - gate - convolution
    dense += products.router if optimizer.muon.router == "muon" else 0
    return dense, moe.num_experts * arch.mlp_products(model, arch.expert_ffn(model)) if kind.moe else 0


def muon_parameters(model: Model, optimizer: Optimizer) -> int:
    """Weights of the whole model that Muon updates, depths of multi-token prediction included."""
    if optimizer.kind != "muon":
        return 0
    layers = [*arch.layer_kinds(model), *([arch.mtp_kind(model)] * model.mtp.num_layers)]
    return sum(sum(layer_matrices(model, kind, optimizer)) for kind in layers) + model.mtp.num_layers * 2 * model.hidden_size**2
