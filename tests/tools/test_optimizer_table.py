"""The table of `phalanx check`: every parameter is in one row, and the planner counts the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.load import load_config
from parallel.architecture import padded_vocab
from parallel.flops import count_parameters
from parallel.memory.hardware import GIB
from parallel.memory.job import make_job
from parallel.memory.weights import stage_held, state_bytes
from parallel.muon import muon_parameters
from pretrain.preflight.disk_space import checkpoint_bytes
from tools.check import main
from tools.optimizer_table import optimizer_rows
from tools.planner.timing import time_step

PRESETS = ("deepseek_v3", "qwen3_30b_a3b", "quickstart", "deepseek_v2_lite")


@pytest.mark.parametrize("router", ["adamw", "muon"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_is_in_one_row(name: str, router: str) -> None:
    config = load_config(name, ["optimizer.kind=muon", f"optimizer.muon.router={router}"]).config
    vocab = config.model.vocab_size or 2048
    rows = optimizer_rows(config, vocab)
    counted = count_parameters(config.model, padded_vocab(config.model, vocab))
    assert sum(row.parameters for row in rows) == counted.total + counted.mtp
    muons = sum(row.parameters for row in rows if row.updater == "muon")
    assert muons == muon_parameters(config.model, config.optimizer) and 0.5 * counted.total < muons < counted.total + counted.mtp
    assert any("router" in row.name for row in rows if row.updater == "muon") == (router == "muon")
    adamw = load_config(name).config
    assert checkpoint_bytes(adamw, vocab) - checkpoint_bytes(config, vocab) == 4 * muons


def test_the_ledger_keeps_one_moment_less() -> None:
    """DeepSeek-V3: every rank together holds 4 bytes less for each parameter of Muon. The time of a step differs by its work."""
    words = ["zero={engine: megatron, stage: 1}"]
    jobs = [make_job(load_config("deepseek_v3", [*words, f"optimizer.kind={kind}"]).config, 129280) for kind in ("adamw", "muon")]
    layout = jobs[0].layout
    ranks = layout.tensor * layout.data * layout.context
    states = [sum(state_bytes(job, held).optimizer for held in stage_held(job)) * ranks for job in jobs]
    muon = load_config("deepseek_v3", ["optimizer.kind=muon"]).config
    saved = 4 * muon_parameters(muon.model, muon.optimizer)
    # Tensor ranks hold norms, routers and down projections more than once.
    assert states[0] - states[1] == pytest.approx(saved, rel=0.02), (states, saved / GIB)
    adamw, muons = (time_step(job).step_s for job in jobs)
    assert adamw != muons and muons == pytest.approx(adamw, rel=0.05)


def test_check_prints_both_optimizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quickstart", f"run.dir={tmp_path / 'run'}", "optimizer.kind=muon", "--no-data", "model.vocab_size=2048"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "muon     2,555,904 parameters in 16 tensors, 112 matrices" in text and "adamw    " in text
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["optimizer"]
    assert found["parameters"]["muon"] == 2_555_904
    assert {row["updater"] for row in found["rows"]} == {"muon", "adamw"}
