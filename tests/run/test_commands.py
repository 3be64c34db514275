"""What the user's commands leave behind and print, on the real program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_config
from pretrain.preflight.disk_space import checkpoint_bytes
from pretrain.run.events import COMMON_FIELDS, EventKind, check_event
from pretrain.run.files import iterate_lines
from pretrain.run.folder import EXIT_CODE, NAMES, RunFolder
from tests.run.world import ROOT, STEPS, check_equal, launch


def phalanx(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.cli", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_the_run_folder_is_as_the_docs_say(undisturbed: Path) -> None:
    page = (ROOT / "docs" / "survival.md").read_text()
    for name in ("config.yaml", "provenance.json", "metrics.jsonl", "events.jsonl", "outcome.json", "DONE"):
        assert (undisturbed / name).exists()
        assert name in page
    assert sorted(path.name for path in (undisturbed / "logs" / "attempt_0001").glob("rank_*.log")) == [
        "rank_0.log",
        "rank_1.log",
    ]
    checkpoints = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert checkpoints == [f"step_{STEPS - 2:07d}", f"step_{STEPS:07d}"], "the newest two are kept"
    manifest = json.loads((undisturbed / "checkpoints" / checkpoints[-1] / "manifest.json").read_text())
    assert manifest["step"] == STEPS and manifest["consumed_samples"] == 8 * STEPS
    assert manifest["tensors"]["decoder.layers.3.mlp.experts.linear_fc1.weight"]["shape"] == [8, 48, 32]


def test_everything_in_the_run_folder_is_in_its_contract(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} <= NAMES


def test_every_event_of_a_run_is_as_its_table_says(undisturbed: Path) -> None:
    rows = [row for _, row in iterate_lines(undisturbed / "events.jsonl") if row]
    for row in rows:
        common = {field.name for field in COMMON_FIELDS}
        assert common <= row.keys()
        check_event(EventKind(row["kind"]), {key: value for key, value in row.items() if key not in common})
    assert {"attempt", "saved", "pruned", "outcome"} <= {row["kind"] for row in rows}


def test_a_checkpoint_takes_the_room_that_is_asked_for(undisturbed: Path) -> None:
    config = load_config(str(undisturbed / "config.yaml")).config
    written = sum(path.stat().st_size for path in (undisturbed / "checkpoints" / f"step_{STEPS:07d}").glob("*.safetensors"))
    assert checkpoint_bytes(config, 700) == pytest.approx(written, rel=0.15), "headers and buffers are small"


def test_a_row_has_what_people_watch(undisturbed: Path) -> None:
    rows = [row for _, row in iterate_lines(undisturbed / "metrics.jsonl") if row]
    keys = {
        "step", "loss", "grad_norm", "lr", "tokens", "samples", "step_time_s", "tokens_per_s", "tflops_per_gpu", "aux_loss",
        "expert_load_max_over_mean", "dead_experts", "memory_gib/stage_0", "memory_gib/stage_1",
    }  # fmt: skip
    for row in rows:
        assert keys <= set(row)
    assert "val_loss" in rows[-1]
    assert rows[-1]["tokens"] == STEPS * 8 * 32


def test_the_end_says_where_everything_is(undisturbed: Path) -> None:
    text = undisturbed.with_suffix(".txt").read_text()
    for words in (
        "ln(vocab)",
        "unigram entropy",
        "held-out loss",
        "tokens/s",
        "run folder",
        "checkpoint",
        "phalanx wandb",
        "next:",
    ):
        assert words in text


def test_status_and_logs(undisturbed: Path) -> None:
    status = json.loads(phalanx("status", str(undisturbed), "--json").stdout)
    assert status["state"] == "finished" and status["step"] == STEPS
    goodput, events = status["goodput"], [row for _, row in iterate_lines(undisturbed / "events.jsonl") if row]
    assert goodput.pop("ratio") == pytest.approx(goodput["steps_s"] / sum(goodput.values()), abs=1e-3)
    assert sum(goodput.values()) == pytest.approx(events[-1]["time"] - events[0]["began"], abs=0.1), "every second once"
    assert goodput["startup_s"] > 1 and goodput["steps_s"] > 0 and goodput["saves_s"] > 0 and goodput["again_s"] == 0
    assert events[-1]["goodput"]["steps_s"] == goodput["steps_s"]
    assert f"step {STEPS}" in phalanx("logs", str(undisturbed)).stdout
    merged = phalanx("logs", str(undisturbed), "--rank", "all").stdout
    assert f"[rank 0] step {STEPS}/{STEPS}" in merged


def test_a_finished_run_is_not_started_again(run_config: Path, undisturbed: Path) -> None:
    again = launch(run_config, undisturbed)
    assert again.end() == 0
    assert "is finished" in again.output
    assert RunFolder(undisturbed).last_attempt() == 1


@pytest.mark.prove
def test_two_agents_on_loopback_train_the_same(run_config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Two machines of one rank by hand, as the README says."""
    run_dir = tmp_path / "agents"
    port = 20000 + os.getpid() % 10000
    agent = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "1", "--local-addr", "127.0.0.1",
        str(ROOT / "pretrain" / "main.py"), "--config", str(run_config), f"run.dir={run_dir}", "launch.nodes=2",
        "launch.processes_per_node=1",
    ]  # fmt: skip
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(agent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in agents]
    assert [process.returncode for process in agents] == [0, 0], outputs
    check_equal(run_dir, undisturbed)


def test_bad_input_is_one_report_and_exit_2(run_config: Path, tmp_path: Path) -> None:
    words = ["data.train=[{path: nowhere}]"]
    told = launch(run_config, tmp_path / "none", *words)
    assert told.end() == 2 and "nowhere.bin" in told.errors and not (tmp_path / "none").exists()
    missing = launch(run_config, tmp_path / "none", *words, "--no-data")
    assert missing.end() == 2
    assert "nowhere" in missing.errors and "Traceback" not in missing.errors
    assert not (tmp_path / "none" / "metrics.jsonl").exists()
    other = launch(run_config, tmp_path / "none", "parallel.tensor=3", "model.hidden_sise=64")
    assert other.end() == 2
    assert "hidden_size" in other.errors and "Traceback" not in other.errors


def test_the_model_of_a_run_folder_cannot_change(run_config: Path, undisturbed: Path) -> None:
    changed = launch(run_config, undisturbed, "model.hidden_size=64", f"run.steps={STEPS + 1}")
    assert changed.end() == 2
    assert "another architecture" in changed.errors
    assert (undisturbed / "DONE").exists()


def test_a_diverged_run_ends_in_its_reason_and_not_in_torchruns_traceback(run_config: Path, tmp_path: Path) -> None:
    """All ranks end with exit code 3, which torchrun reports as a failure."""
    words = ("optimizer.lr=1e30", "optimizer.clip_grad_norm=0", "schedule.warmup_steps=0", "checkpoint.interval_steps=null")
    command = launch(run_config, tmp_path / "blown", *words)
    assert command.end() == EXIT_CODE["diverged"] == 3, command.errors
    last = [line for line in command.errors.splitlines() if line][-2:]
    assert last[0].startswith("diverged: ") and last[1].startswith("logs: "), command.errors
    shown = [command.output, command.errors, phalanx("logs", str(tmp_path / "blown")).stdout]
    status = phalanx("status", str(tmp_path / "blown")).stdout
    assert "diverged: " in status
    for text in (*shown, status):
        assert "Traceback" not in text and "ChildFailedError" not in text and "failed first" not in text, text
