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
    if muon.split_heads == "head" and arch.is_mla(model):
        return _split_latent(name, num_rows, model)
    return [((0, num_rows),)]


def _split_qkv(num_rows: int, model: Model, per_head: bool) -> list[RowRuns]:
    """Rows lie by group of query heads: the group's query heads, its key, its value."""
    groups, width = arch.num_query_groups(model), arch.head_dim(model)
    per_group = model.attention.num_heads // groups
    heads = _pieces([width] * (groups * (per_group + 2)), num_rows)
    if per_head:
        return heads
    slots = [slice(0, per_group), slice(per_group, per_group + 1), slice(per_group + 1, per_group + 2)]
    starts = range(0, len(heads), per_group + 2)
    return [
        tuple(run for start in starts for head in heads[start : start + per_group + 2][slot] for run in head) for slot in slots
    ]


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


def layer_matrices(model: Model, is_moe: bool, optimizer: Optimizer) -> tuple[int, int]:
    """(dense weights, routed experts' weights) of one layer that Muon updates under optimizer.kind = muon."""
    products, moe = arch.layer_products(model, is_moe), model.moe
    gate = model.hidden_size if is_moe and moe.shared_gate else 0
    dense = products.attention + products.dense + products.shared - gate
    dense += products.router if optimizer.muon.router == "muon" else 0
    return dense, moe.num_experts * arch.mlp_products(model, arch.expert_ffn(model)) if is_moe else 0


def muon_parameters(model: Model, optimizer: Optimizer) -> int:
    """Weights of the whole model that Muon updates, depths of multi-token prediction included."""
    if optimizer.kind != "muon":
        return 0
    layers = [*arch.moe_layers(model), *([arch.mtp_is_moe(model)] * model.mtp.num_layers)]
    return (
        sum(sum(layer_matrices(model, is_moe, optimizer)) for is_moe in layers) + model.mtp.num_layers * 2 * model.hidden_size**2
    )
