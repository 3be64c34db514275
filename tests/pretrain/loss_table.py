"""Every loss term and every way in which a step is cut up and put together again: what must hold, as one table.

docs/losses.md prints this table; tests/pretrain/test_losses.py has a test for each of its cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# What a cell says. `test_losses.py` has one check for each of these words.
SAME = "same"
SAME_CUT = "same cut"
FORMULA = "formula"
VALID = "valid tokens"
ALL = "all tokens"
MEANING = {
    SAME: "the same loss, gradients, weights and record as one process that takes one sequence at a time",
    SAME_CUT: "the same as one process whose micro-batches hold the same sequences: the loss is defined on micro-batches",
    FORMULA: "the term depends on this division by definition, and its gradient is that of the loss written out by hand",
    VALID: "tokens without loss change nothing, and the mean is over those that have one",
    ALL: "every token counts, also those without loss: the loss mask changes nothing",
}

REDUCTIONS: dict[str, dict[str, Any]] = {
    # Sequences of one micro-batch: 2 in place of 1.
    "micro-batch": {"batch__micro_batch_seqs": 2},
    # The whole global batch in one micro-batch: nothing is accumulated.
    "accumulation": {"batch__micro_batch_seqs": 4},
    "data": {"launch__processes_per_node": 2},
    "context": {"parallel__context": 2, "launch__processes_per_node": 2},
    "tensor": {"parallel__tensor": 2, "launch__processes_per_node": 2},
    "pipeline": {"parallel__pipeline": 2, "launch__processes_per_node": 2},
    "expert": {"parallel__expert": 2, "launch__processes_per_node": 2},
    "loss mask": {},
}


@dataclass(frozen=True)
class Term:
    """One part of what is minimised: its keys with values large enough to show, and how it behaves where it isn't `SAME`."""

    name: str
    what: str
    keys: dict[str, Any]
    mask: str
    other: dict[str, str] = field(default_factory=dict)

    def cell(self, reduction: str) -> str:
        return self.mask if reduction == "loss mask" else self.other.get(reduction, SAME)


_NONE = {"model__moe__router__balance": "none"}


def _balance(name: str) -> dict[str, Any]:
    return {"model__moe__router__balance": name, "model__moe__router__aux_loss_coeff": 0.7}


TERMS = (
    Term("lm", "cross entropy of the next token", _NONE, VALID),
    Term("mtp", "of the tokens after it", _NONE | {"model__mtp__num_layers": 1, "model__mtp__loss_coeff": 0.7}, VALID),
    Term("aux_loss", "load of a micro-batch", _balance("aux_loss"), ALL, {"micro-batch": FORMULA, "accumulation": FORMULA}),
    Term("seq_aux_loss", "load of each sequence", _balance("seq_aux_loss"), ALL),
    Term(
        "global_aux_loss", "load of the batch so far", _balance("global_aux_loss"), ALL,
        {"micro-batch": FORMULA, "accumulation": FORMULA, "data": SAME_CUT, "expert": SAME_CUT},
    ),
    Term("z_loss", "size of the router's logits", _NONE | {"model__moe__router__z_loss_coeff": 0.1}, ALL),
    Term(
        "expert_bias", "moves against the load; no gradient",
        _NONE | {
            "model__moe__router__score": "sigmoid", "model__moe__router__expert_bias": True,
            "model__moe__router__expert_bias_update_rate": 0.05,
        },
        ALL,
    ),
)  # fmt: skip


def markdown() -> str:
    """The table as docs/losses.md has it."""
    head = ["term", "is about", *REDUCTIONS]
    rows = [[f"`{term.name}`", term.what, *(term.cell(reduction) for reduction in REDUCTIONS)] for term in TERMS]
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)
