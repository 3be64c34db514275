"""The map between a model's canonical tensors and the tensors of a family's files, with a ledger of their rows.

In: family, model, and for an import what the files hold. Out: `WeightMap`. The ledger: every row of a source tensor is used
once, and every row of a target is written once. Only the padding of the vocabulary has no source.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.hf_config.family import Family, TensorRule
from tools.convert.tensors.canonical_shapes import Shape, tensor_shapes
from tools.convert.tensors.row_mappings import FusionRule, RowMapping

TensorPart = tuple[str, tuple[int, ...]]
"""A tensor, or one expert of a stacked tensor: (name, lead)."""


@dataclass(frozen=True)
class WeightMap:
    """All row mappings of a model, by canonical tensor and by tensor of the files."""

    shapes: dict[str, Shape]
    by_canonical: dict[TensorPart, list[RowMapping]]
    by_hf: dict[TensorPart, list[RowMapping]]
    hf_shapes: dict[str, Shape]

    def num_rows(self, part: TensorPart) -> int:
        return self.shapes[part[0]][len(part[1])]


def make_weight_map(family: Family, model: Model, holds: Callable[[str], bool] | None = None) -> WeightMap:
    """The row mappings of every canonical tensor.

    `holds`: whether the files hold a tensor; it selects one of several forms. Without it the first form is used.
    """
    shapes = tensor_shapes(model)
    by_canonical: dict[TensorPart, list[RowMapping]] = {}
    for name, lead, hf_names, join in _named(family, model, holds):
        by_canonical[(name, lead)] = list(join(model, name, lead, shapes[name][len(lead)], hf_names))
    by_hf: dict[TensorPart, list[RowMapping]] = {}
    for mappings in by_canonical.values():
        for mapping in mappings:
            by_hf.setdefault((mapping.hf_name, mapping.hf_lead), []).append(mapping)
    weight_map = WeightMap(shapes, by_canonical, by_hf, _hf_shapes(by_hf, shapes))
    audit(weight_map, model)
    return weight_map


def _named(
    family: Family, model: Model, holds: Callable[[str], bool] | None
) -> Iterator[tuple[str, tuple[int, ...], list[str], FusionRule]]:
    """(canonical name, lead, names in the files, fusion rule) of every canonical tensor, or of each expert of it."""
    head = "model.layers.{L}."
    scopes: list[tuple[str, str, set[str]]] = [("", head, {"model"})]
    for layer, kind in enumerate(arch.layer_kinds(model)):
        scopes.append((f"decoder.layers.{layer}.", head.replace("{L}", str(layer)), _scopes(kind)))
    for depth in range(model.mtp.num_layers):
        hf_head = family.depth_prefix or head.replace("{L}", str(model.num_layers + depth))
        scopes.append((f"mtp.layers.{depth}.", hf_head, {"mtp"}))
        scopes.append((f"mtp.layers.{depth}.transformer_layer.", hf_head, _scopes(arch.mtp_kind(model))))
    for prefix, hf_head, wanted in scopes:
        for rule in family.tensors:
            if rule.scope not in wanted or not rule.when(model):
                continue
            for lead in [(e,) for e in range(model.moe.num_experts)] if rule.scope == "expert" else [()]:
                yield prefix + rule.canonical_name, lead, *_form(rule, (head, hf_head), lead, holds)


def _scopes(kind: arch.LayerKind) -> set[str]:
    """The scopes of tensor rules that a layer of this kind has."""
    return {"layer", "delta" if kind.delta else "attention", *(("moe", "expert") if kind.moe else ("dense",))}


def _form(
    rule: TensorRule, head: tuple[str, str], lead: tuple[int, ...], holds: Callable[[str], bool] | None
) -> tuple[list[str], FusionRule]:
    """`head`: the start of a layer's names in the rules, and what stands for it in the files."""
    options = []
    for names, join in rule.forms:
        filled = [name.replace(*head).replace("{E}", str(lead[0]) if lead else "") for name in names]
        options.append((filled, join))
    if holds is not None:
        for names, join in options:
            if all(holds(name) for name in names):
                return names, join
    return options[0]


def _hf_shapes(by_hf: dict[TensorPart, list[RowMapping]], shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Shape of each tensor of the files, from the mappings that use it."""
    result: dict[str, Shape] = {}
    leads: dict[str, int] = {}
    for (name, lead), mappings in by_hf.items():
        inner = shapes[mappings[0].name][len(mappings[0].lead) + 1 :]
        rows = max(mapping.hf_end for mapping in mappings)
        block = (*inner, rows) if mappings[0].transposed else (rows, *inner)
        if lead:
            leads[name] = max(leads.get(name, 0), lead[0] + 1)
            block = (leads[name], *block)
        result[name] = block
    return result


def audit(weight_map: WeightMap, model: Model) -> None:
    """Check the ledger. A failure is a bug in a family's description."""
    leads = {name: _leads(name, shape) for name, shape in weight_map.shapes.items()}
    wanted = {(name, lead) for name in weight_map.shapes for lead in leads[name]}
    assert wanted == set(weight_map.by_canonical), (
        f"described and needed tensors differ: {sorted(wanted ^ set(weight_map.by_canonical))[:4]}"
    )
    for (name, lead), mappings in weight_map.by_canonical.items():
        edge = 0
        for mapping in sorted(mappings, key=lambda mapping: mapping.row):
            assert mapping.row == edge, f"{name}{lead}: rows {edge} to {mapping.row} have no source, or two"
            edge += mapping.rows
        full = (
            model.vocab_size
            if name in ("embedding.word_embeddings.weight", "output_layer.weight")
            else weight_map.num_rows((name, lead))
        )
        assert edge == full, f"{name}{lead}: {edge} of {full} rows have a source"
    for (name, lead), mappings in weight_map.by_hf.items():
        used = np.zeros(max(mapping.hf_end for mapping in mappings), dtype=np.int8)
        for mapping in mappings:
            used[mapping.hf_row : mapping.hf_end : mapping.hf_step] += 1
        assert (used == 1).all(), f"{name}{lead}: rows are used {used.min()} to {used.max()} times"


def _leads(name: str, shape: Shape) -> list[tuple[int, ...]]:
    return [(index,) for index in range(shape[0])] if ".mlp.experts." in name else [()]


def width(shape: Shape, lead: tuple[int, ...]) -> int:
    """Number of elements of one row."""
    return prod(shape[len(lead) + 1 :])
