"""The search and the commands."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from statistics import median

import pytest

from configs.load import load_config, to_yaml
from parallel.legality.verdict import check_config
from parallel.memory.hardware import make_machine
from parallel.memory.job import make_job
from pretrain.data.tokenizer import vocab_size
from tests.run.world import launch, write_config
from tests.tools.planner.conftest import WORDS, config_of
from tests.tools.planner.published_best import rank
from tools import cli
from tools.planner.calibrate import WARMUP_STEPS, calibrate, read_config, read_rows
from tools.planner.candidates import TIE, robust_first
from tools.planner.planning import make_plan
from tools.planner.risk import nic_kinds, risk_of
from tools.planner.search import SearchResult, search

DEGREES = ("tensor", "pipeline", "context", "expert", "expert_tensor")


def found(*words: str) -> SearchResult:
    config = config_of("qwen3_30b_a3b", "launch.nodes=2", "batch.global_batch_seqs=128", *words)
    assert config.model.vocab_size
    return search(config, config.model.vocab_size, make_machine(config))


def test_candidates_are_legal_fit_and_stand_in_order() -> None:
    result = found()
    assert len(result.candidates) > 10
    times = [candidate.plan.timing.step_s for candidate in result.candidates]
    assert times == sorted(times)
    tied = sum(time <= (1 + TIE) * times[0] for time in times)
    assert [candidate.tie for candidate in result.candidates] == [True] * tied + [False] * (len(times) - tied)
    for candidate in result.candidates:
        assert check_config(candidate.config).ok and candidate.plan.fits
    assert result.candidates[0].pareto


def test_the_robust_list_orders_ties_by_what_they_lean_on() -> None:
    fastest = found().candidates
    robust = robust_first(fastest)
    tied = sum(candidate.tie for candidate in fastest)
    order = [(candidate.leans, candidate.plan.timing.step_s) for candidate in robust[:tied]]
    assert order == sorted(order) and robust[tied:] == fastest[tied:] and robust != fastest
    assert sorted(candidate.words for candidate in robust) == sorted(candidate.words for candidate in fastest)


def test_risk_tells_nic_launches_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes: experts' tokens and gradients over the NIC; on one node nothing."""
    two = found().candidates
    for candidate in two:
        wide = candidate.degrees.expert * candidate.degrees.expert_tensor > 8
        risk = risk_of(candidate.plan)
        assert 0 <= risk.memory_free < 1 and 0 < risk.launches < 1 and 0 <= risk.nic < 1
        assert not wide or risk.nic >= candidate.plan.timing.breakdown_s["expert_far"] / candidate.plan.timing.step_s > 0
    one = config_of("qwen3_30b_a3b", "launch.nodes=1", "batch.global_batch_seqs=128", "parallel.expert=8")
    assert nic_kinds(make_job(one, one.model.vocab_size)) == {"expert_far"}
    code, out, _ = run(capsys, "plan", "qwen3_30b_a3b", "--search", "batch.global_batch_seqs=64", "--json")
    document = json.loads(out)
    assert code == 0 and [("risk" in candidate) for candidate in document["candidates"]] == [True] * 5 + [False] * 5
    code, out, _ = run(capsys, "plan", "qwen3_30b_a3b", "--search", "--robust", "batch.global_batch_seqs=64")
    assert code == 0 and "memory free" in out and "1= " in out


def test_a_named_dispatcher_is_kept_and_a_free_one_is_flex_where_tokens_travel(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("launch.nodes=2", "batch.global_batch_seqs=64", "--json", "--top", "40")
    for named, travelling in ((), "flex"), (("model.moe.dispatcher=alltoall",), "alltoall"):
        code, out, _ = run(capsys, "plan", "qwen3_30b_a3b", "--search", *words, *named)
        document = json.loads(out)
        assert code == 0 and any("DeepEP" in note for note in document["notes"]) == (not named)
        for candidate in document["candidates"]:
            settings = " ".join(candidate["settings"])
            stays = "parallel.expert=1 " in settings and "parallel.expert_tensor=1 " in settings
            assert f"model.moe.dispatcher={'alltoall' if stays else travelling}" in settings


def test_search_is_deterministic() -> None:
    assert [c.words for c in found().candidates] == [c.words for c in found("parallel.tensor=2").candidates]


# The fastest published of each model, GPU and number format, where the search has it among the first five;
# docs/planner.md says of how many.
BEST = [
    "bridge-26.08-Qwen3_235B_a22B-GB300-256-MXFP8-pretrain-9",
    "bridge-26.08-Qwen3_235B_a22B-GB200-256-MXFP8-pretrain-10",
    "bridge-26.04.01-Qwen3_235B_a22B-B200-256-MXFP8-pretrain-87",
    "bridge-25.11-Qwen3_235B_a22B-GB300-256-BF16-pretrain-224",
    "mcoremoe-t11-Qwen3_235B_a22B-GB200-bf16-4096",
    "bridge-26.04.01-DeepSeekV3-B200-256-MXFP8-pretrain-73",
    "mcoremoe-t11-DeepSeekV3-GB200-bf16-4096",
    "mcoremoe-t11-DeepSeekV3-GB200-mxfp8-4096",
    "bridge-26.06-DeepSeekV3-GB300-256-MXFP8-pretrain-23",
    "bridge-26.04.01-LLAMA3_70B-GB300-64-MXFP8-pretrain-57",
    "bridge-26.04.01-LLAMA3_70B-GB200-64-MXFP8-pretrain-60",
    "bridge-26.04.01-LLAMA3_70B-H100-64-FP8-pretrain-62",
    "folding-t2",
]


@pytest.mark.parametrize("name", [BEST[-1]])
def test_published_best_layouts_come_first(name: str) -> None:
    place, candidates = rank(name)
    assert place is not None and place <= 5 and candidates > 20


@pytest.mark.prove
@pytest.mark.parametrize("name", BEST[:-1])
def test_more_published_best_layouts_come_first(name: str) -> None:
    place, candidates = rank(name)
    assert place is not None and place <= 5 and candidates > 20


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_30b_a3b", "deepseek_v2_lite", "gpt4_class"])
def test_shipped_runs_are_among_the_first_ten_of_their_search(name: str) -> None:
    """By degrees and by step time, with all dispatchers free. quickstart says in its file why it is not."""
    config = load_config(name).config
    size = vocab_size(config)
    candidates = search(config, size or 0, make_machine(config)).candidates
    own = make_plan(make_job(config, size))
    degrees = [{key: candidate.config.parallel.__dict__[key] for key in DEGREES} for candidate in candidates[:10]]
    assert {key: config.parallel.__dict__[key] for key in DEGREES} in degrees
    assert own.fits and own.timing.step_s <= candidates[9].plan.timing.step_s


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_settings_of_a_candidate_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "launch.nodes=2", "batch.global_batch_seqs=128"]
    code, out, _ = run(capsys, "plan", "model/qwen3_30b_a3b", *words, "--search", "--top", "2", "--json")
    document = json.loads(out)
    assert code == 0 and len(document["candidates"]) == 2 and document["notes"]
    best = document["candidates"][0]
    code, out, _ = run(capsys, "plan", "model/qwen3_30b_a3b", *words, *best["settings"], "--json")
    again = json.loads(out)
    assert code == 0 and again["time"] == best["time"] and again["memory"] == best["memory"] and again["fits"]


def test_json_contract(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", "model/llama3_8b", *WORDS, "cluster.price_per_gpu_hour_usd=2", "--json")
    document = json.loads(out)
    assert code == 0 and not err
    assert {"model", "layout", "memory", "time", "run", "fits", "notes"} <= set(document)
    assert {"params_total", "params_active", "flops_per_token"} <= set(document["model"])
    names = {"stage", "weights_gib", "gradients_gib", "optimizer_gib", "activations_gib", "buffers_gib", "total_gib"}
    assert names <= set(document["memory"]["ranks"][0]) and {"peak_gib", "capacity_gib"} <= set(document["memory"])
    assert {"step_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "bubble_fraction", "breakdown_s"} <= set(document["time"])
    assert {"steps", "days", "gpu_hours", "cost_usd"} <= set(document["run"])


def test_plan_that_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "model/llama3_70b", *WORDS)
    assert code == 0 and "DOES NOT FIT" in out and "parallel.tensor=2" in out


def test_check_refuses_by_the_lower_bound_and_warns_by_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "model/llama3_70b", *WORDS, "--no-data", "--json")
    document = json.loads(out)
    assert code == 2 and "GiB" in document["problems"][0]["rule"] and "plan --search" in document["problems"][0]["fix"]
    tight = ("parallel.tensor=2", "batch.micro_batch_seqs=5", "batch.global_batch_seqs=240")
    words = ["model/llama3_8b", *WORDS, *tight, "--no-data", "--json"]
    document = json.loads((run(capsys, "check", *words))[1])
    assert document["ok"] and any("GiB" in warning["text"] for warning in document["warnings"])


def test_a_plan_that_fits_closely_is_at_risk(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "parallel.tensor=2", "batch.global_batch_seqs=240"]
    close = ["model/llama3_8b", *words, "batch.micro_batch_seqs=4"]
    code, out, _ = run(capsys, "plan", *close)
    assert code == 0 and "GiB: at risk" in out and "expandable_segments" in out
    document = json.loads(run(capsys, "plan", *close, "--json")[1])
    assert document["fits"] and document["memory"]["verdict"] == "at risk"
    assert document["memory"]["peak_gib"] < document["memory"]["capacity_gib"] < document["memory"]["risk_gib"]
    warnings = json.loads(run(capsys, "check", *close, "--no-data", "--json")[1])["warnings"]
    assert any("at risk" in warning["text"] for warning in warnings)
    document = json.loads(run(capsys, "plan", "model/llama3_8b", *words, "batch.micro_batch_seqs=2", "--json")[1])
    assert document["memory"]["verdict"] == "fits" and not any("at risk" in note for note in document["notes"])


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "nosuch"),
        ("plan", "model/llama3_8b", *WORDS, "cluster.gpu=H1000"),
        ("plan", "model/llama3_8b", *WORDS, "parallel.tensor=3"),
        ("plan", "model/llama3_8b", *WORDS, "--top", "0"),
        ("plan", "model/llama3_8b", *WORDS, "--calibrate", "nosuch"),
        ("plan-validate", "nosuch.json"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2 and not out and "fix:" in err


def test_calibration_by_a_measured_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = config_of("llama3_8b", "parallel.tensor=2")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    first = json.loads(run(capsys, "plan", "model/llama3_8b", *WORDS, "parallel.tensor=2", "--json")[1])
    slow = 1.3 * first["time"]["step_s"]
    lines = [
        json.dumps({"step": n, "step_time_s": slow if n > 5 else 9 * slow, "memory_gib/stage_0": 30.0}) for n in range(1, 12)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 12, "step_ti')
    code, out, _ = run(capsys, "plan", "model/llama3_8b", *WORDS, "parallel.tensor=2", "--calibrate", str(tmp_path), "--json")
    document = json.loads(out)
    assert code == 0 and document["time"]["step_s"] == pytest.approx(slow, rel=1e-4)
    assert document["memory"]["ranks"][0]["allocated_gib"] == pytest.approx(30.0, rel=0.02)


def test_a_run_calibrates_plans_of_its_own_kind_of_machine_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(config_of("llama3_8b", "cluster.gpu=A100")))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_time_s": 3.0}\n')
    code, out, err = run(capsys, "plan", "model/llama3_8b", *WORDS, "--calibrate", str(tmp_path))
    assert code == 2 and not out and "A100" in err and "H100" in err


@pytest.mark.prove
def test_calibrated_by_a_real_run(folder: Path, tmp_path: Path) -> None:
    """On these CPUs: the run's own step time comes out, and another batch is predicted better than without."""
    config = write_config(tmp_path / "small.yaml", folder)
    words = ((), ("batch.global_batch_seqs=32",))
    measured, with_typed_values, scaled = [], [], []
    for number, more in enumerate(words):
        command = launch(config, tmp_path / f"run{number}", *more)
        assert command.end() == 0, command.errors
        rows = read_rows(command.folder.metrics)[WARMUP_STEPS:]
        measured.append(median(row["step_time_s"] for row in rows))
        loaded = read_config(tmp_path / f"run{number}")
        job = make_job(loaded, vocab_size(loaded))
        with_typed_values.append(make_plan(job).timing.step_s)
        scaled.append(make_plan(job, calibrate(str(tmp_path / "run0"), loaded)).timing.step_s)
    assert scaled[0] == pytest.approx(measured[0], rel=0.01)
    assert abs(log(scaled[1] / measured[1])) < abs(log(with_typed_values[1] / measured[1]))


def test_engines_of_others_are_planned_and_marked(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama-3-8B on 8 GPUs: FSDP2 keeps fp32 gradients whole over two micro-batches, and divides them with one."""
    words, params = ("plan", "model/llama3_8b", *WORDS, "launch.nodes=1", "batch.micro_batch_seqs=1"), 8.03e9
    gradients = {}
    for engine, batch in (("fsdp2", 16), ("fsdp2", 8), ("megatron_fsdp", 16)):
        code, out, _ = run(capsys, *words, f"batch.global_batch_seqs={batch}", "--engine", engine, "--json")
        document = json.loads(out)
        rank_memory = document["memory"]["ranks"][0]
        gradients[engine, batch] = rank_memory["gradients_gib"] * 2**30
        assert code == 0 and document["engine"] == engine and document["runnable"] is False
        assert rank_memory["weights_gib"] * 2**30 == pytest.approx(params * (4 if engine == "fsdp2" else 2) / 8, rel=0.01)
        assert "no such engine" in document["notes"][0]
    assert gradients["fsdp2", 16] == pytest.approx(4 * params, rel=0.01)
    assert gradients["fsdp2", 8] < 4 * params / 8 * 1.01
    assert gradients["megatron_fsdp", 16] == pytest.approx(4 * params / 8, rel=0.01)


@pytest.mark.parametrize(("engine", "recompute"), [("fsdp2", {"none", "full"}), ("megatron_fsdp", {"none", "selective", "full"})])
def test_a_search_as_an_engine_of_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, engine: str, recompute: set[str]
) -> None:
    """Fastest first, each as `plan --engine` has it whatever the config says of zero, and marked in text, JSON and page."""
    page = tmp_path / "page.html"
    words = ["plan", "model/qwen3_30b_a3b", *WORDS, "launch.nodes=2", "batch.global_batch_seqs=128", "zero.engine=deepspeed"]
    words += ["--engine", engine, "parallel.overlap_expert_comm=true"]
    code, out, _ = run(capsys, *words, "--search", "--top", "100", "--json", "--html", str(page))
    document = json.loads(out)
    candidates = document["candidates"]
    assert code == 0 and len(candidates) > 20 and "not runnable here" in page.read_text(encoding="utf-8")
    for marked in (document, *candidates):
        assert marked["engine"] == engine and marked["runnable"] is False
    assert "no such engine" in document["notes"][0]
    times = [candidate["time"]["step_s"] for candidate in candidates]
    assert times == sorted(times) and all(candidate["fits"] for candidate in candidates)
    settings = [dict(word.split("=", 1) for word in candidate["settings"]) for candidate in candidates]
    assert not any(name.startswith("zero") for each in settings for name in each)
    assert {each["recompute.mode"] for each in settings} <= recompute
    for name, value in (("parallel.overlap_expert_comm", "true"), ("model.moe.dispatcher", "flex")):
        assert (value in {each[name] for each in settings}) == (engine == "megatron_fsdp")
    recomputed = next(candidate for candidate in candidates if "recompute.mode=full" in candidate["settings"])
    for chosen in (candidates[0], recomputed):
        code, out, _ = run(capsys, *words, *chosen["settings"], "--json", "--html", str(page))
        again = json.loads(out)
        assert code == 0 and again["time"] == chosen["time"] and again["memory"] == chosen["memory"]
        assert again["layout"] == chosen["layout"] and again["runnable"] is False
        assert "not runnable here" in page.read_text(encoding="utf-8")
    code, out, _ = run(capsys, *words, "--search")
    assert code == 0 and "NOT RUNNABLE" in out and f"--engine {engine}" in out.split("settings of the best: ")[1]


def test_presets_for_planning_only_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "launch.nodes=32", "parallel.tensor=8", "parallel.pipeline=8", "batch.global_batch_seqs=64"]
    code, out, _ = run(capsys, "plan", "model/grok_1", *words, "--json")
    assert code == 0 and any("model.planning_only" in note for note in json.loads(out)["notes"])
    assert run(capsys, "check", "model/grok_1", *words, "--no-data", "--json")[0] == 2
