"""Every cell of the table of losses (tests/pretrain/loss_table.py): each term under each reduction, on the real model."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Config
from tests.parallel.compat.test_router_losses import by_hand, router_gradient
from tests.pretrain import world
from tests.pretrain.loss_table import ALL, FORMULA, MEANING, REDUCTIONS, SAME, SAME_CUT, TERMS, VALID, Term, markdown
from tests.pretrain.world import Trained, assemble, largest_difference, small_config, train_small
from tests.ranks import run_ranks

DOCS = Path(__file__).resolve().parents[2] / "docs" / "losses.md"
STEPS = 2
# A cell `SAME` of these shows what that of another reduction shows: larger micro-batches, and data ranks with split experts.
SHOWN_BY = {"accumulation": "micro-batch", "data": "expert"}


def mark_of(term: Term, reduction: str) -> list[pytest.MarkDecorator]:
    other = SHOWN_BY.get(reduction)
    return [pytest.mark.prove] if other and term.cell(reduction) == term.cell(other) == SAME else []


CELLS = [
    pytest.param(term, reduction, marks=mark_of(term, reduction), id=f"{term.name} x {reduction}")
    for term in TERMS
    for reduction in REDUCTIONS
]


def config_of(term: Term, **more: Any) -> Config:
    return small_config(**({"zero__stage": 0, "run__steps": STEPS} | term.keys | more))


def trained(term: Term, **more: Any) -> list[Trained]:
    config = config_of(term, **more)
    return run_ranks(config.launch.processes_per_node, train_small, config, True)


@cache
def reference(name: str, micro_batch_seqs: int) -> list[Trained]:
    (term,) = [term for term in TERMS if term.name == name]
    return trained(term, batch__micro_batch_seqs=micro_batch_seqs)


def numbers(ranks: list[Trained]) -> dict[str, float]:
    """Loss, norm, tokens and router losses of each step, and the held-out loss."""
    found = {"valid": ranks[0].valid}
    for step, (loss, norm, tokens, record) in enumerate(ranks[0].steps):
        found |= {f"{step} loss": loss, f"{step} norm": norm, f"{step} tokens": tokens}
        found |= {f"{step} {name}": value for name, value in record.items()}
    return found


def assert_same(got: list[Trained], want: list[Trained]) -> None:
    assert numbers(got) == pytest.approx(numbers(want), rel=1e-5)
    for kind in ("gradients", "weights"):
        found, wanted = (assemble([getattr(rank, kind) for rank in ranks]) for ranks in (got, want))
        difference, where = largest_difference(found, wanted, floor=1e-4)
        assert difference < 1e-4, f"{kind}: {where}"


def gradients(term: Term, monkeypatch: pytest.MonkeyPatch, valid: float, poison: bool = False, **more: Any) -> dict[str, Any]:
    """First gradients of one process whose labels have a loss with the probability `valid`; `poison`: where they have none
    the label is another one."""

    def masked(config: Config, step: int, data_rank: int, data_size: int) -> list[Any]:
        made = []
        for batch in original(config, step, data_rank, data_size):
            random = torch.rand(batch.loss_mask.shape, generator=torch.Generator().manual_seed(3))
            mask = (random < valid).float()
            labels = torch.where(mask == 0, 7, batch.labels) if poison else batch.labels
            made.append(replace(batch, loss_mask=mask, labels=labels))
        return made

    original = world.batches_of
    with monkeypatch.context() as patch:
        patch.setattr(world, "batches_of", masked)
        # Clipping divides all gradients by one norm, which is another with other masks.
        (rank,) = trained(term, run__steps=1, optimizer__clip_grad_norm=0.0, **more)
    return {"numbers": numbers([rank]), "tensors": assemble([rank.gradients, rank.weights])}


def check_valid(term: Term, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels without a loss may be anything. Depths predict tokens further on, whose masks are those of the same labels."""
    plain, poisoned = (gradients(term, monkeypatch, 0.6, poison) for poison in (False, True))
    assert plain["numbers"] == poisoned["numbers"]
    assert largest_difference(plain["tensors"], poisoned["tensors"])[0] == 0.0
    whole = gradients(term, monkeypatch, 1.0)
    assert plain["numbers"]["0 tokens"] < 0.8 * whole["numbers"]["0 tokens"]
    # A sum over fewer tokens would be 0.6 of it.
    assert plain["numbers"]["0 loss"] == pytest.approx(whole["numbers"]["0 loss"], rel=0.05)


def check_all(term: Term, monkeypatch: pytest.MonkeyPatch) -> None:
    """The term's own gradient, what it adds to the others', is the same with every label and with few."""
    if term.name == "expert_bias":
        biases = [
            {key: tensor for key, tensor in gradients(term, monkeypatch, valid)["tensors"].items() if "expert_bias" in key[1]}
            for valid in (1.0, 0.6)
        ]
        assert largest_difference(biases[0], biases[1])[0] == 0.0
        assert all(abs(bias).max() > 0.04 for bias in biases[0].values())
        return
    off: dict[str, Any] = {key: 0.0 for key in term.keys if key.endswith("coeff")}
    added = []
    for valid in (1.0, 0.6):
        on, without = gradients(term, monkeypatch, valid), gradients(term, monkeypatch, valid, **off)
        keys = [key for key in on["tensors"] if key[0] == "grad"]
        added.append({key: on["tensors"][key] - without["tensors"][key] for key in keys})
        assert on["numbers"][f"0 {term.name}"] > 0
    difference, where = largest_difference(added[1], added[0], floor=1e-3)
    assert difference < 1e-3, where


@pytest.mark.parametrize(("term", "reduction"), CELLS)
def test_each_term_under_each_reduction(term: Term, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = term.cell(reduction)
    if cell == VALID:
        check_valid(term, monkeypatch)
    elif cell == ALL:
        check_all(term, monkeypatch)
    elif cell == FORMULA:
        micro_batch_seqs = REDUCTIONS[reduction]["batch__micro_batch_seqs"]
        got, want = router_gradient(term.name, micro_batch_seqs, 1), by_hand(term.name, micro_batch_seqs, 1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.norm()))
    else:
        # Two data ranks count two micro-batches at once.
        assert_same(trained(term, **REDUCTIONS[reduction]), reference(term.name, 2 if cell == SAME_CUT else 1))


def test_the_documentation_prints_this_table() -> None:
    text = DOCS.read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- loss table -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert shown == markdown()
    for word, meaning in MEANING.items():
        assert f"- **{word}**: {meaning}." in text
