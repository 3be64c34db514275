"""The table of engines, stages and features."""

from __future__ import annotations

import pytest

from configs.load import load_config
from parallel.legality.zero_table import COSTS, FEATURES, LEGAL, REFUSED, STAGES, applying, lookup, rows


def test_every_entry_names_a_feature_and_a_way_out() -> None:
    for name, cells in rows():
        assert name in FEATURES
        for (engine, stage), entry in cells.items():
            assert stage in STAGES[engine]
            assert entry.verdict != REFUSED or entry.fix
            assert entry.verdict not in (REFUSED, COSTS) or entry.why


@pytest.mark.parametrize(
    ("engine", "stage", "feature", "verdict"),
    [
        ("deepspeed", 1, "pipeline", LEGAL),
        ("deepspeed", 2, "pipeline", COSTS),
        ("deepspeed", 3, "virtual pipeline", LEGAL),
        ("deepspeed", 0, "bf16 weights", REFUSED),
        ("deepspeed", 2, "offload to nvme", REFUSED),
        ("deepspeed", 3, "offload to nvme", COSTS),
        ("megatron", 1, "optimizer offload", REFUSED),
        ("megatron", 0, "overlapped gathering", REFUSED),
    ],
)
def test_golden_cells(engine: str, stage: int, feature: str, verdict: str) -> None:
    assert lookup(engine, stage, feature).verdict == verdict


def test_what_applies_to_a_config() -> None:
    words = ["zero={engine: deepspeed, stage: 3, offload: param}", "model.tie_embeddings=true"]
    found = {(entry.feature, entry.verdict) for _, entry in applying(load_config("quickstart", words).config)}
    assert found == {("pipeline", COSTS), ("embedding on two stages", COSTS), ("parameter offload", COSTS)}
