"""Which rows of a canonical tensor are which rows of a Hugging Face tensor. A conversion is a list of such mappings.

In: a canonical tensor (or one expert of it), the names of the tensors that hold it, and how these are fused. Out:
`RowMapping`s. A tensor is seen as [lead…, rows, columns]: `lead` is the expert of a stacked tensor; a vector has rows only.
Fusing moves whole rows (queries, keys and values interleaved by group; gate above up), so that tensors of any size can be
streamed. Only gpt-oss transposes and interleaves, expert by expert.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from configs.model_schema import Model
from parallel import architecture as arch


@dataclass(frozen=True)
class RowMapping:
    """Rows [row, row + rows) of `name`[lead] are the rows hf_row, hf_row + hf_step, … of `hf_name`[hf_lead].

    `transposed`: the Hugging Face tensor is [columns, rows], so that its rows are counted in its last dim.
    """

    name: str
    lead: tuple[int, ...]
    row: int
    rows: int
    hf_name: str
    hf_lead: tuple[int, ...] = ()
    hf_row: int = 0
    hf_step: int = 1
    transposed: bool = False

    @property
    def is_plain(self) -> bool:
        """The rows are whole and in the same order, so that any part of them can be copied by itself."""
        return self.hf_step == 1 and not self.transposed

    @property
    def hf_end(self) -> int:
        """One past the last row of the Hugging Face tensor that the mapping uses."""
        return self.hf_row + (self.rows - 1) * self.hf_step + 1


FusionRule = Callable[[Model, str, tuple[int, ...], int, Sequence[str]], Iterator[RowMapping]]
"""(model, canonical name, lead, rows, names in the files) -> mappings."""


def same(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """The tensor itself."""
    yield RowMapping(name, lead, 0, rows, hf_names[0])


def stacked(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """The tensor itself, from a Hugging Face tensor that stacks the experts."""
    yield RowMapping(name, lead, 0, rows, hf_names[0], hf_lead=lead)


def one_row(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """A vector, from a Hugging Face tensor of one row (ERNIE 4.5)."""
    yield RowMapping(name, lead, 0, rows, hf_names[0], hf_lead=(0,))


def vocab(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """The rows of real tokens. The padding of the vocabulary, after them, is zero."""
    assert model.vocab_size, "a converted model states its vocabulary"
    yield RowMapping(name, lead, 0, model.vocab_size, hf_names[0])


def gate_up(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """[gate; up] from one tensor each."""
    half = rows // 2
    yield RowMapping(name, lead, 0, half, hf_names[0])
    yield RowMapping(name, lead, half, half, hf_names[1])


def query_key_value(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """For each query group its queries, its key and its value, from one tensor each.

    With an output gate the gates of a group follow its queries. The files have each head's query and gate one after the other.
    """
    groups, width = arch.num_query_groups(model), arch.head_dim(model)
    heads, parts = model.attention.num_heads // groups, 2 if model.attention.output_gate else 1
    queries = heads * parts * width
    for group in range(groups):
        first = group * (queries + 2 * width)
        for part in range(parts) if parts > 1 else ():
            for head in range(heads):
                at = ((group * heads + head) * parts + part) * width
                yield RowMapping(name, lead, first + (part * heads + head) * width, width, hf_names[0], hf_row=at)
        if parts == 1:
            yield RowMapping(name, lead, first, queries, hf_names[0], hf_row=group * queries)
        yield RowMapping(name, lead, first + queries, width, hf_names[1], hf_row=group * width)
        yield RowMapping(name, lead, first + queries + width, width, hf_names[2], hf_row=group * width)


def query_key_value_together(
    model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]
) -> Iterator[RowMapping]:
    """For each query group its queries, its key and its value, from one tensor: all queries, all keys, all values (Phi-3)."""
    groups, width = arch.num_query_groups(model), arch.head_dim(model)
    heads = model.attention.num_heads
    starts = {part: first * width for part, first in zip("qkv", (0, heads, heads + groups))}
    for mapping in query_key_value(model, name, lead, rows, list(starts)):
        yield replace(mapping, hf_name=hf_names[0], hf_row=starts[mapping.hf_name] + mapping.hf_row)


def _by_key_head(
    model: Model, name: str, lead: tuple[int, ...], sources: Sequence[tuple[str, Sequence[int]]]
) -> Iterator[RowMapping]:
    """For each key head its rows of each source, in order.

    A source is (name in the files, rows of a head in each part). The file holds a part of all heads, then the next part.
    """
    heads, row = model.delta_net.num_key_heads, 0
    for head in range(heads):
        for hf_name, parts in sources:
            start = 0
            for part in parts:
                yield RowMapping(name, lead, row, part, hf_name, hf_row=start + head * part)
                row, start = row + part, start + heads * part


def _delta_parts(model: Model) -> tuple[int, int, int]:
    """Rows of one key head: of its query or key, of the values of its value heads, of one number for each of them."""
    net = model.delta_net
    ratio = net.num_value_heads // net.num_key_heads
    return net.key_head_dim, ratio * net.value_head_dim, ratio


def delta_columns(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """The convolution of a gated delta net: [query; key; values] of each key head, from [queries; keys; values]."""
    key, value, _ = _delta_parts(model)
    return _by_key_head(model, name, lead, [(hf_names[0], (key, key, value))])


def delta_grouped(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """The input projection of a gated delta net from two tensors that have the rows of each key head together (Qwen3-Next)."""
    key, value, ratio = _delta_parts(model)
    return _by_key_head(model, name, lead, [(hf_names[0], (2 * key + 2 * value,)), (hf_names[1], (2 * ratio,))])


def delta_separate(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """The input projection of a gated delta net from [queries; keys; values], gates, betas and steps (Qwen3.5)."""
    key, value, ratio = _delta_parts(model)
    parts = ((key, key, value), (value,), (ratio,), (ratio,))
    return _by_key_head(model, name, lead, list(zip(hf_names, parts, strict=True)))


def interleaved(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """[gate; up] from a stacked tensor that alternates gate and up by rows (gpt-oss's biases and packed weights)."""
    half = rows // 2
    yield RowMapping(name, lead, 0, half, hf_names[0], lead, 0, 2)
    yield RowMapping(name, lead, half, half, hf_names[0], lead, 1, 2)


def interleaved_columns(
    model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]
) -> Iterator[RowMapping]:
    """[gate; up] from a stacked, transposed tensor that alternates gate and up by columns (gpt-oss)."""
    half = rows // 2
    yield RowMapping(name, lead, 0, half, hf_names[0], lead, 0, 2, True)
    yield RowMapping(name, lead, half, half, hf_names[0], lead, 1, 2, True)


def stacked_columns(model: Model, name: str, lead: tuple[int, ...], rows: int, hf_names: Sequence[str]) -> Iterator[RowMapping]:
    """The tensor from a stacked, transposed one (gpt-oss)."""
    yield RowMapping(name, lead, 0, rows, hf_names[0], hf_lead=lead, transposed=True)
