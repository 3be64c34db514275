"""Rows of others: what is compared, what is left out, and how far the predictions are off."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np
import pytest

from parallel.architecture import window_of_layer
from parallel.flops import training_flops
from parallel.memory.job import PlannedJob
from parallel.memory.ledger import UNDER_PLANNED
from tools.planner.candidates import TIE
from tools.planner.published.fit import fit
from tools.planner.published.rows import runs_of
from tools.planner.published.validate import ROWS, memory_errors, shipped_runs, unseen_errors, validate
from tools.planner.timing import fitted


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return json.loads(ROWS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return validate(rows)


def row(**changes: Any) -> dict[str, Any]:
    """A row as anyone might write it."""
    model = {"name": "M", "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_heads": 32, "num_kv_heads": 8,
             "vocab_size": 128256}  # fmt: skip
    base = {"id": "x", "source": "someone", "gpu": "H100", "n_gpus": 8, "model": model, "seq_len": 8192, "micro_batch": 1,
            "global_batch": 128, "measured": {"tokens_per_s_per_gpu": 10000}}  # fmt: skip
    return base | changes


def test_shipped_factors_are_the_fit_of_the_shipped_rows() -> None:
    assert np.allclose(fitted(), fit(shipped_runs()), rtol=0.01)


def test_errors_stay_where_they_were_measured(document: dict[str, Any]) -> None:
    """A guard against regressions; the figures themselves are printed by plan-validate."""
    speed, memory = document["tokens_per_s"], document["memory"]
    assert speed["median_abs_rel_err"] <= 0.07 and speed["dense"]["median_abs_rel_err"] <= 0.06
    assert speed["moe"]["median_abs_rel_err"] <= 0.12 and speed["p90_abs_rel_err"] <= 0.22
    assert document["tokens_per_s_calibrated"]["median_abs_rel_err"] <= 0.08
    assert speed["median_abs_rel_err"] < 0.5 * document["tokens_per_s_constant_mfu"]["median_abs_rel_err"]
    assert memory["median_abs_rel_err"] <= 0.05 and memory["p90_abs_rel_err"] <= 0.22
    fits = document["fits"]
    assert fits["ran_said_fits"] >= 0.95 * fits["ran"] and fits["ran_refused"] <= 3
    assert fits["ran_with_recompute_not_stated_some_fits"] >= 0.95 * fits["ran_with_recompute_not_stated"]
    assert fits["out_of_memory_said_too_large"] == fits["out_of_memory"] > 0


def test_at_risk_is_what_one_run_in_ten_took_more(rows: list[dict[str, Any]]) -> None:
    measured = [run for run in runs_of(rows, "memory")[0] if run.memory_gb is not None and not run.oom]
    more = 1 / (1 + memory_errors(measured)) - 1
    assert len(more) > 180 and np.percentile(more, 90) == pytest.approx(UNDER_PLANNED, abs=0.01)


def test_a_tie_is_what_errors_between_layouts_of_one_machine_are() -> None:
    """Two published layouts of one model, machine and batch: by so much their errors differ, the model and machine unseen."""
    runs = shipped_runs()
    alike: dict[tuple[object, ...], list[tuple[tuple[int, ...], float]]] = defaultdict(list)
    for run, error in zip(runs, unseen_errors(runs, lambda run: run.group)):
        job, layout = run.job, run.job.layout
        degrees = (layout.tensor, layout.pipeline, layout.context, layout.expert)
        alike[run.group, job.compute, layout.world_size, job.seq_length, job.global_batch].append((degrees, error))
    pairs = (pair for same in alike.values() for pair in combinations(same, 2))
    differences = [abs(one[1] - other[1]) for one, other in pairs if one[0] != other[0]]
    assert len(differences) > 200
    assert median(differences) == pytest.approx(TIE, abs=0.01)


def test_every_row_is_counted(document: dict[str, Any]) -> None:
    apart = sum(part["rows"] for part in document["apart"].values())
    assert document["rows"] == document["tokens_per_s"]["rows"] + apart + sum(document["skipped"].values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "lora"}, "LoRA"),
        ({"notes": "token drop CF=1"}, "drops tokens"),
        ({"id": "mlm-golden-x"}, "CI timing"),
        ({"micro_batch": None}, "micro-batch not stated"),
        ({"global_batch": None}, "global batch not stated"),
        ({"n_gpus": None}, "number of GPUs not stated"),
        ({"gpu": "abacus"}, "GPU not in the table"),
        ({"n_gpus": 8, "tp": 3}, "layout does not fill the GPUs"),
        ({"model": {"name": "only a name"}}, "architecture incomplete"),
        ({"measured": {}}, "no speed measured"),
        ({"seq_len": "long"}, "a field is not what its name says"),
        ({"model": "a name"}, "architecture incomplete"),
        ({"zero": "zero-3 offload_optimizer=cpu"}, "offloads to the host"),
        ({"usable": {"time_full": False}}, "its collection calls the speed not comparable"),
        ({"model": row()["model"] | {"linear_attention": "GDN"}}, "linear attention (gated delta net)"),
        ({"tp": 0, "micro_batch": -1}, "a field is not what its name says"),
    ],
)
def test_rows_that_cant_be_compared(changes: dict[str, Any], reason: str) -> None:
    runs, skipped = runs_of([row(**changes)], "time")
    assert not runs and dict(skipped) == {reason: 1}


def job(**changes: Any) -> PlannedJob:
    runs, _ = runs_of([row(**changes)], "time")
    return runs[0].job


@pytest.mark.parametrize(
    ("words", "gpu"),
    [
        ("NVIDIA H100 SXM5 80GB", "H100-SXM-80GB"),
        ("H100 PCIe", "H100-PCIe-80GB"),
        ("A100-SXM4-40GB", "A100-SXM-40GB"),
        ("8 x A100 80GB", "A100-SXM-80GB"),
        ("GB200 NVL72", "GB200-NVL72"),
        ("AMD Instinct MI300X", "MI300X-192GB"),
    ],
)
def test_gpus_by_many_names(words: str, gpu: str) -> None:
    assert job(gpu=words).machine.gpu.name == gpu


@pytest.mark.parametrize(
    ("words", "mode", "modules"),
    [
        ("full activation checkpointing", "full", set()),
        ("yes", "full", set()),
        (True, "full", set()),
        ("selective", "selective", {"core_attn"}),
        ("selective: moe_act, layernorm", "selective", {"moe_act", "layernorm"}),
        ("off", "none", set()),
        (False, "none", set()),
    ],
)
def test_recomputation_by_many_words(words: object, mode: str, modules: set[str]) -> None:
    recompute = job(recompute=words).recompute
    assert recompute.mode == mode and recompute.modules == modules


@pytest.mark.parametrize(
    ("words", "engine", "stage"),
    [("fsdp", "fsdp", 3), ("FSDP2 (zero-3), 64-way", "fsdp2", 3), ("HSDP within 8", "fsdp", 3),
     ("Megatron-FSDP (zero-3 style)", "megatron", 3), (1, "megatron", 1),
     ("ZeRO-2 (DeepSpeed)", "deepspeed", 2), ("DDP", "megatron", 0), (None, "megatron", 1)],
)  # fmt: skip
def test_zero_by_many_words(words: object, engine: str, stage: int) -> None:
    zero = job(zero=words).zero
    assert (zero.engine, zero.stage) == (engine, stage)


@pytest.mark.parametrize(
    ("words", "dispatcher"),
    [({}, "flex"), ({"dispatcher": "alltoall"}, "alltoall"), ({"dispatcher": "flex"}, "flex"),
     ({"notes": "all-to-all tokens"}, "alltoall"), ({"notes": "HybridEP; forced balance"}, "flex"),
     ({"dispatcher": "allgather"}, "allgather"), ({"zero": "FSDP2"}, "alltoall"), ({"zero": "FSDP2", "notes": "DeepEP"}, "flex"),
     ({"source": "Megatron-Bridge docs/performance-summary.md", "model": "Qwen3-235B-A22B", "gpu": "B300"}, "alltoall"),
     ({"source": "Megatron-Bridge docs/performance-summary.md", "model": "Qwen3-235B-A22B", "gpu": "GB300"}, "flex")],
)  # fmt: skip
def test_dispatchers_by_many_words(words: dict[str, Any], dispatcher: str) -> None:
    assert job(**({"model": "Qwen3-30B-A3B"} | words)).dispatcher == dispatcher


def test_sources_of_2026_are_predicted_without_themselves() -> None:
    """Whole sources left out of the fit: median errors of tokens/s."""
    sources = ("KempnerInstitute", "NVIDIA-NeMo/Automodel", "OLMo-core", "torchtitan fork")
    runs = [run for run in shipped_runs() if any(words in run.source for words in sources) or run.id.startswith("titan-nvfp4")]
    errors = np.abs(np.exp(-unseen_errors(runs, lambda run: run.source)) - 1)
    moe = np.array([run.is_moe for run in runs])
    assert (len(runs), int(moe.sum())) == (61, 42)
    assert np.median(errors[moe]) <= 0.1 and np.median(errors[~moe]) <= 0.1


@pytest.mark.parametrize(
    ("words", "experts_only", "wide_layers", "casts_apart"),
    [({"precision": "mxfp8"}, False, 0, False), ({"precision": "mxfp8", "zero": "FSDP2"}, False, 0, True),
     ({"precision": "mxfp8 (experts), rest bf16", "zero": "FSDP2", "notes": "TE"}, True, 0, False),
     ({"precision": "nvfp4 (layers 0-26), bf16 (27-31, head)", "zero": "FSDP2"}, False, 5, True),
     ({"precision": "float8 tensorwise", "zero": "FSDP2"}, False, 0, False),
     ({"precision": "float8 rowwise", "zero": "FSDP2"}, False, 0, True)],
)  # fmt: skip
def test_number_formats_by_many_words(words: dict[str, Any], experts_only: bool, wide_layers: int, casts_apart: bool) -> None:
    found = job(gpu="B200", **words)
    assert (found.experts_only, found.wide_layers, found.casts_apart) == (experts_only, wide_layers, casts_apart)


@pytest.mark.parametrize(
    ("words", "eager", "early_flash"),
    [({}, True, True), ({"notes": "2026-06-30"}, True, False), ({"gpu": "B200"}, True, False), ({"notes": "TE"}, False, False),
     ({"notes": "FSDP+compile"}, False, True), ({"notes": "torch.compile off"}, True, True),
     ({"notes": "torch.compile(MLA)"}, True, True), ({"precision": "float8"}, False, True)],
)  # fmt: skip
def test_pytorchs_kernels_by_many_words(words: dict[str, Any], eager: bool, early_flash: bool) -> None:
    found = job(zero="FSDP2", **words)
    assert (found.eager, found.early_flash) == (eager, early_flash)


@pytest.mark.parametrize(
    ("words", "waits"),
    [({}, False), ({"gpu": "GB200", "tp": 4}, False), ({"gpu": "GB200"}, True), ({"precision": "nvfp4"}, True),
     ({"zero": "FSDP2"}, True), ({"zero": "FSDP2", "notes": "async TP"}, False), ({"tp": 1, "precision": "nvfp4"}, False),
     ({"notes": "no TP overlap"}, True)],
)  # fmt: skip
def test_tensor_parallel_traffic_that_waits(words: dict[str, Any], waits: bool) -> None:
    assert job(**({"tp": 8} | words)).tensor_waits == waits


@pytest.mark.parametrize(
    ("words", "eager", "grouped"),
    [({}, False, False), ({"zero": "FSDP2"}, True, True), ({"zero": "FSDP2", "notes": "TE + DeepEP"}, False, True),
     ({"zero": "FSDP2", "notes": "TE grouped experts"}, False, False), ({"zero": "none", "notes": "torch.compile"}, False, True)],
)  # fmt: skip
def test_kernels_by_many_words(words: dict[str, Any], eager: bool, grouped: bool) -> None:
    found = job(**words)
    assert (found.eager, found.grouped_launch) == (eager, grouped)


@pytest.mark.parametrize(
    ("notes", "overlap"), [("", None), ("EP overlap (1F1B)", True), ("router balanced; no EP overlap", False)]
)
def test_expert_traffic_beside_computation(notes: str, overlap: bool | None) -> None:
    assert job(notes=notes).expert_overlap == overlap


def test_nodes_of_fewer_gpus() -> None:
    assert job(notes="nodes of FOUR H200, IB between nodes", gpu="H200").machine.domain == 4
    assert job(notes="nodes of four GB200", gpu="GB200").machine.domain == 72


@pytest.mark.parametrize(
    ("words", "windows"),
    [({"window": 8, "window_layers": "0-1,3 sliding, 2 full"}, [8, 8, None, 8]),
     ({"window": 8, "window_layers": "even layers sliding, odd full"}, [8, None, 8, None]),
     ({"sliding_window": 8, "sliding_every": 2}, [8, None, 8, None]), ({"sliding_window": 8}, [8, 8, 8, 8]), ({}, [None] * 4)],
)  # fmt: skip
def test_windows_by_many_words(words: dict[str, Any], windows: list[int | None]) -> None:
    model = job(model=row()["model"] | {"num_layers": 4} | words).model
    assert [window_of_layer(model, layer) for layer in range(4)] == windows


def test_a_known_name_brings_its_routing_groups_and_biases(rows: list[dict[str, Any]]) -> None:
    found = {run.job.model.name: run.job.model for run in shipped_runs()}
    assert found["DeepSeek-V3 (671B-A37B)"].moe.router.num_groups == 8 and found["gpt-oss-120b"].mlp_bias


def test_numbers_as_text_and_speeds_of_every_kind() -> None:
    assert job(seq_len="8,192", n_gpus="8", precision="bf16-mixed").seq_length == 8192
    step_tokens, per_token = 128 * 8192, training_flops(job().model, 128256, 8192)
    measured = {
        10000.0: {"tokens_per_s": 80000},
        step_tokens / 2 / 8: {"step_time_s": 2},
        4e14 / per_token.per_token: {"tflops_per_gpu": 400},
    }
    for speed, how in measured.items():
        runs, _ = runs_of([row(measured=how, flops_convention="causal")], "time")
        assert runs[0].tokens_per_s == pytest.approx(speed)
    full = runs_of([row(measured={"tflops_per_gpu": 400}, flops_convention="full attention, no recompute")], "time")[0][0]
    assert full.tokens_per_s == pytest.approx(4e14 / (per_token.per_token + per_token.attention_scores))
    assert runs_of([row(source=None, id=None)], "time")[0]


@pytest.mark.parametrize(
    ("name", "preset"),
    [("Llama-3 70B", "llama3_70b"), ("LLAMA3.1_405B", "llama3_405b"), ("DeepSeek-V3 (671B-A37B)", "deepseek_v3"),
     ("Qwen3-235B", "qwen3_235b_a22b"), ("Mixtral 8x7B", "mixtral_8x7b")],
)  # fmt: skip
def test_a_known_name_brings_its_architecture_and_is_counted(name: str, preset: str) -> None:
    runs, _ = runs_of([row(model=name, n_gpus=256)], "time")
    assert runs[0].job.model.name == preset
    assert validate([row(model={"name": name}, n_gpus=256)])["assumed"]["architecture: of the preset of that name"] == 1


def test_a_known_name_with_another_size_is_not_the_preset() -> None:
    assert not runs_of([row(model={"name": "Llama-3 70B", "num_layers": 16})], "time")[0]


def test_unseen_row_is_predicted_and_duplicates_count_once() -> None:
    document = validate([row(), row()])
    assert document["tokens_per_s"]["rows"] == 1 and document["skipped"] == {"exact duplicate": 1}
    assert document["tokens_per_s"]["median_abs_rel_err"] < 0.3


def test_no_rows() -> None:
    document = validate([])
    assert document["rows"] == 0 and document["tokens_per_s"]["median_abs_rel_err"] is None
    json.dumps(document)


@pytest.mark.parametrize("value", [0, -1, 1.5, "x", [], {"a": 1}, True, 1e308, 10**12, float("nan")])
def test_a_wrong_field_is_counted_never_a_traceback(value: Any) -> None:
    names = ("n_gpus", "tp", "seq_len", "gpu", "precision", "recompute", "notes", "source", "model", "measured")
    changed = [row(**{name: value}) for name in names]
    changed += [row(model=row()["model"] | {name: value}) for name in row()["model"]]
    document = validate(changed)
    assert document["rows"] == len(changed)
    json.dumps(document)
