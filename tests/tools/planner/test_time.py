"""FLOPs anchors, and laws of the time model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parallel.architecture import LayerKind
from parallel.flops import training_flops
from parallel.memory.hardware import find_gpu, make_machine
from parallel.memory.job import PlannedJob, Recomputation, make_job
from tests.tools.planner.conftest import config_of
from tools.planner.dispatch import remote_copies
from tools.planner.duration import Failures, estimate_run, goodput, interval_s
from tools.planner.planning import Calibration, expert_overlap_note, make_plan, tensor_overlap_note
from tools.planner.step_cost import INDEX, KINDS, layer_work, stage_micro_work
from tools.planner.timing import fitted, step_vector, time_step
from tools.planner.update_cost import data_bytes, step_work


def llama(*words: str) -> PlannedJob:
    config = config_of("llama3_8b", "launch.nodes=4", "batch.global_batch_seqs=128", *words)
    return make_job(config, config.model.vocab_size)


def test_gpt3_takes_3640_petaflop_days() -> None:
    """arXiv 2005.14165, table D.1: 300 billion tokens."""
    model = config_of("gpt3_175b").model
    days = training_flops(model, model.vocab_size or 0, 2048).per_token * 300e9 / 86400 / 1e15
    assert days == pytest.approx(3640, rel=0.05)


def test_gpt4_class_budget() -> None:
    """25,000 A100 for 95 days at 34% MFU are 2.15e25 FLOP."""
    gpu = find_gpu("A100")
    assert gpu is not None
    assert 25000 * 95 * 86400 * 0.34 * gpu.bf16_tflops * 1e12 == pytest.approx(2.15e25, rel=0.02)


def test_products_are_the_models_flops() -> None:
    """Work at full speed, turned back into FLOPs, is what parallel/flops.py counts for weights and head."""
    job = llama()
    gpu = job.machine.gpu
    seconds = stage_micro_work(job)[:, INDEX["gemm"]].sum()
    flops = training_flops(job.model, job.padded_vocab, job.seq_length)
    want = (flops.per_token - flops.attention_scores) * job.micro_tokens
    assert seconds * gpu.bf16_tflops * 1e12 * gpu.gemm_bf16 == pytest.approx(want, rel=1e-9)


def test_context_ranks_exchange_the_heads_of_delta_nets() -> None:
    """Half of what the input projection made of a token, and of its output, leaves a rank of two: forward and back."""
    config = config_of("qwen3_next_80b_a3b", "launch.nodes=1", "parallel.context=2", "batch.global_batch_seqs=16")
    job = make_job(config, config.model.vocab_size)
    sent = layer_work(job, LayerKind(True, True), None, False)[INDEX["context"]] * job.machine.bandwidth_gb_s(2) * 1e9
    projected = 2 * 16 * 128 + 2 * 32 * 128 + 2 * 32
    assert sent == pytest.approx(2 * 2 * job.micro_tokens * (projected + 32 * 128) / 2)


def sparse_job(length: int, *words: str) -> PlannedJob:
    config = config_of("deepseek_v3_2", "launch.nodes=32", "parallel.expert=64", "parallel.pipeline=4",
                       "batch.global_batch_seqs=64", f"batch.seq_length_tokens={length}", *words)  # fmt: skip
    return make_job(config, config.model.vocab_size)


def test_products_of_sparse_models_are_their_flops() -> None:
    """The indexer's projections, which carry no gradient to their input, are in the products."""
    job = sparse_job(4096, "model.mtp.num_layers=0")
    gpu = job.machine.gpu
    seconds = stage_micro_work(job)[:, [INDEX["gemm"], INDEX["experts"]]].sum()
    flops = training_flops(job.model, job.padded_vocab, job.seq_length)
    projections = 4 * 61 * (1536 * 64 * 128 + 7168 * (128 + 64))
    want = flops.per_token - flops.attention_scores - flops.router - flops.indexer + projections
    assert seconds * gpu.bf16_tflops * 1e12 * gpu.gemm_bf16 == pytest.approx(want * job.micro_tokens, rel=1e-9)


def test_sparse_attention_saves_time_on_long_sequences_only() -> None:
    """Below top_k an indexer only costs. At 128K it saves most of the scores; in bf16 its own cost more time than in fp8."""
    short, long = (
        [
            time_step(sparse_job(length, word)).step_s
            for word in ("model.dsa.top_k=null", "run.steps=1", "model.dsa.index_dtype=bf16")
        ]
        for length in (2048, 131072)
    )
    assert short[0] < short[1] < short[2]
    assert long[1] < long[2] < long[0]


@pytest.mark.parametrize(
    "words", [(), ("parallel.tensor=2", "parallel.pipeline=2"), ("parallel.pipeline=4", "parallel.virtual_pipeline=2")]
)
def test_breakdown_adds_up(words: tuple[str, ...]) -> None:
    timing = time_step(llama(*words))
    assert sum(timing.breakdown_s.values()) == pytest.approx(timing.step_s)
    assert (timing.bubble_fraction > 0) == (len(words) > 0 and "pipeline" in words[-1])


def test_bubble_follows_the_schedule() -> None:
    """(pp - 1) / vpp micro-batches of waiting beside m of work, when stages are alike."""
    with_typed_values, interleaved = llama("parallel.pipeline=4"), llama("parallel.pipeline=4", "parallel.virtual_pipeline=2")
    factors = fitted()
    for job, waits in ((with_typed_values, 3.0), (interleaved, 1.5)):
        work, waiting = step_vector(job, factors)
        kind = INDEX["attention"]
        assert waiting[kind] / (work[kind] - waiting[kind]) == pytest.approx(waits / job.num_micro_batches, rel=0.15)


def test_work_shrinks_with_tensor_parallelism_and_pays_for_it() -> None:
    one, two = llama(), llama("parallel.tensor=2")
    a, b = stage_micro_work(one)[0], stage_micro_work(two)[0]
    assert b[INDEX["gemm"]] == pytest.approx(a[INDEX["gemm"]] / 2)
    assert a[INDEX["tensor"]] == 0 < b[INDEX["tensor"]]


def test_recomputation_costs_time() -> None:
    job = llama()
    full = replace(job, recompute=Recomputation("full"))
    assert 1.15 < time_step(full).step_s / time_step(job).step_s < 1.4


def test_tokens_to_experts_leave_the_domain() -> None:
    words = ("launch.nodes=4", "batch.global_batch_seqs=128")
    for expert, far in ((8, False), (32, True)):
        config = config_of("qwen3_30b_a3b", *words, f"parallel.expert={expert}")
        work = stage_micro_work(make_job(config, config.model.vocab_size))[0]
        assert (work[INDEX["expert_far"]] > 0) == far


def test_experts_over_the_nic_hide_where_the_schedule_allows_it() -> None:
    words = ("launch.nodes=8", "batch.global_batch_seqs=128", "parallel.expert=32", "parallel.pipeline=2")
    with_typed_values, chunked, full = (
        make_job(config, config.model.vocab_size)
        for config in (
            config_of("qwen3_30b_a3b", *words, *more)
            for more in ((), ("parallel.virtual_pipeline=2",), ("parallel.virtual_pipeline=2", "recompute.mode=full"))
        )
    )
    published = [replace(job, expert_overlap=None) for job in (with_typed_values, chunked, full)]
    assert [job.hides_experts for job in published] == [False, True, False]
    assert time_step(published[1]).step_s < time_step(chunked).step_s


def test_a_plan_says_what_overlapping_the_experts_tokens_would_save() -> None:
    words = ("launch.nodes=8", "batch.global_batch_seqs=128", "parallel.expert=32", "parallel.pipeline=2")
    with_typed_values, off, on = (
        config_of("qwen3_30b_a3b", *words, *more)
        for more in ((), ("parallel.virtual_pipeline=2",), ("parallel.virtual_pipeline=2", "parallel.overlap_expert_comm=true"))
    )
    plans = [make_plan(make_job(config, config.model.vocab_size)) for config in (with_typed_values, off, on)]
    assert plans[2].timing.step_s < plans[1].timing.step_s
    note = expert_overlap_note(plans[1], off)
    assert note is not None and "parallel.overlap_expert_comm=true" in note
    assert expert_overlap_note(plans[0], with_typed_values) is None and expert_overlap_note(plans[2], on) is None


def test_group_limited_routing_visits_fewer_domains() -> None:
    """DeepSeek-V3: 4 of 8 groups, on 4 nodes of 2 groups: 4·(1 - C(6,4)/C(8,4)) nodes, a quarter of them the token's own."""
    words = ("launch.nodes=4", "parallel.expert=32", "batch.global_batch_seqs=128")
    config = config_of("deepseek_v3", *words, "model.moe.dispatcher=flex")
    job = make_job(config, config.model.vocab_size)
    assert remote_copies(job)[1] == pytest.approx(4 * (1 - 15 / 70) * 3 / 4)
    config.model.moe.router.num_groups = config.model.moe.router.group_top_k = None
    assert remote_copies(job)[1] == pytest.approx(4 * (1 - 0.75**8) * 3 / 4)


def test_the_all_to_all_dispatcher_sends_a_copy_for_each_expert() -> None:
    """Qwen3-30B: 8 of 128 experts. On one node of 8 ranks a token has experts on 8·(1 - (7/8)^8) of them, one eighth of which are
    the token's own; on two nodes half of the copies go over the NIC, and by the flex dispatcher at most one."""
    words = ("batch.global_batch_seqs=128", "model.moe.dispatcher=flex")
    one, two = ("parallel.expert=8",), ("launch.nodes=2", "parallel.expert=16")
    near, wide = (make_job(config_of("qwen3_30b_a3b", *words, *more), vocab_size=151936) for more in (one, two))
    assert near.sends_once and remote_copies(near) == (pytest.approx((8 - 1) * (1 - (7 / 8) ** 8)), 0.0)
    assert remote_copies(replace(near, dispatcher="alltoall")) == (pytest.approx(7), 0.0)
    assert remote_copies(wide)[1] == pytest.approx(1 - (1 / 2) ** 8)
    assert remote_copies(replace(wide, dispatcher="alltoall")) == (pytest.approx(8 * (1 / 2 - 1 / 16)), pytest.approx(4))
    assert time_step(wide).step_s < time_step(replace(wide, dispatcher="alltoall")).step_s
    # Every rank has every token: seven copies of eight, eight of sixteen over the NIC.
    assert remote_copies(replace(near, dispatcher="allgather")) == (7, 0)
    assert remote_copies(replace(wide, dispatcher="allgather")) == (7, 8)


def test_tokens_that_come_by_all_to_all_are_sorted_once_more() -> None:
    """Megatron-Core's all-to-all dispatcher permutes tokens before sending and chunks by local expert after; flex fuses it."""
    words = ("batch.global_batch_seqs=128", "parallel.expert=8")
    job = make_job(config_of("qwen3_30b_a3b", *words), vocab_size=151936)
    rows, h, size = job.micro_tokens * 8, job.model.hidden_size, 2
    works = [stage_micro_work(replace(job, dispatcher=name))[0][INDEX["memory"]] for name in ("alltoall", "flex")]
    moved = (works[0] - works[1]) * job.machine.gpu.memory_gb_s * 1e9
    assert moved == pytest.approx(job.model.num_layers * 4 * 2 * rows * h * size)


def test_one_launch_for_all_experts_where_the_kernel_is_grouped() -> None:
    job = make_job(config_of("qwen3_30b_a3b", "batch.global_batch_seqs=128"), vocab_size=151936)
    launches = [stage_micro_work(replace(job, grouped_launch=way))[0][INDEX["expert_kernels"]] for way in (False, True)]
    assert launches == [128 * job.model.num_layers, job.model.num_layers]


def test_exponentials_are_two_a_score() -> None:
    """Forward, and again in flash attention's backward pass: heads·s/2 scores a token."""
    job = llama()
    done = stage_micro_work(job)[0][INDEX["exponentials"]] * job.machine.gpu.exponentials_s
    assert done == pytest.approx(2 * 32 * 32 * job.micro_tokens * job.seq_length / 2)


def test_a_lower_power_limit_slows_products() -> None:
    """Two thirds of the power: the clock falls by its third root."""
    job = llama()
    gpu = replace(job.machine.gpu, power_share=2 / 3)
    one, two = (stage_micro_work(each)[0] for each in (job, replace(job, machine=replace(job.machine, gpu=gpu))))
    assert two[INDEX["gemm"]] / one[INDEX["gemm"]] == pytest.approx(1.5 ** (1 / 3))
    assert two[INDEX["memory"]] == one[INDEX["memory"]]


def test_products_that_wait_for_tensor_parallel_traffic_are_slower() -> None:
    """Ours wait. What hides the traffic is told."""
    job = llama("parallel.tensor=2")
    assert time_step(job).step_s > time_step(replace(job, tensor_waits=False)).step_s
    note = tensor_overlap_note(make_plan(job))
    assert note is not None and "tensor parallel" in note and tensor_overlap_note(make_plan(llama())) is None


def test_gradients_of_a_step() -> None:
    """Scattered and weights gathered under ZeRO-1, reduced to all (twice the way) without."""
    job = llama()
    assert data_bytes(job) == 4 + 2 and data_bytes(replace(job, zero=replace(job.zero, stage=0))) == 2 * 4


def test_factors_are_physical() -> None:
    factors = dict(zip(KINDS, fitted()))
    assert np.isfinite(fitted()).all() and (fitted() > 0).all()
    assert 0.9 < factors["gemm"] < 1.6 and 1.0 < factors["attention"] < 4.0


def test_calibration_scales_time_and_memory() -> None:
    job = llama()
    with_typed_values, scaled = make_plan(job), make_plan(job, Calibration(1.25, 1.1, "run"))
    assert scaled.timing.step_s == pytest.approx(1.25 * with_typed_values.timing.step_s)
    assert scaled.tokens_per_s_per_gpu == pytest.approx(with_typed_values.tokens_per_s_per_gpu / 1.25)
    fullest = with_typed_values.ledger.fullest
    assert scaled.ledger.peak_gib == pytest.approx(with_typed_values.ledger.peak_gib + 0.1 * fullest.allocated_gib)


def test_youngs_interval_and_goodput() -> None:
    save, mtbf = 10.0, 1e6
    best = interval_s(save, mtbf)
    assert best == pytest.approx((2 * save * mtbf) ** 0.5, rel=0.01)
    assert goodput(save, best, mtbf, 600) > max(goodput(save, best / 2, mtbf, 600), goodput(save, best * 2, mtbf, 600))
    assert interval_s(1e7, mtbf) == mtbf


def test_run_estimate() -> None:
    config = config_of("llama3_8b", "launch.nodes=4", "batch.global_batch_seqs=128", "cluster.price_per_gpu_hour_usd=2")
    job = make_job(config, config.model.vocab_size, make_machine(config))
    run = estimate_run(config, job, 3.0, Failures())
    assert run.tokens == 1000 * 128 * 4096 and run.days == pytest.approx(3000 / 86400)
    assert run.gpu_hours == pytest.approx(32 * 3000 / 3600) and run.cost_usd == pytest.approx(2 * run.gpu_hours)
    assert run.checkpoint_gib == pytest.approx(14 * 8.03e9 / 2**30, rel=0.01) and 0 < run.goodput < 1


def test_casts_are_paid_in_fp8_only_and_less_with_block_scales() -> None:
    job = llama()
    works = []
    for name in ("H100", "B200"):
        gpu = find_gpu(name)
        assert gpu is not None
        narrow = replace(job, compute="fp8", machine=replace(job.machine, gpu=gpu))
        works.append(stage_micro_work(narrow)[0][INDEX["casts"]] * gpu.memory_gb_s)
    assert stage_micro_work(job)[0][INDEX["casts"]] == 0 < works[1] == pytest.approx(works[0] * 4 / 6)


def test_deepspeed_reduces_every_micro_batch() -> None:
    once, each = llama("zero.engine=megatron"), llama("zero.engine=deepspeed", "zero.stage=2")
    ratio = step_work(each)[0][INDEX["data"]] / step_work(once)[0][INDEX["data"]]
    assert ratio == pytest.approx((each.num_micro_batches * 4 + 2) / (4 + 2))


def test_chunks_cost_passes() -> None:
    with_typed_values, interleaved = llama("parallel.pipeline=4"), llama("parallel.pipeline=4", "parallel.virtual_pipeline=2")
    passes = [stage_micro_work(job)[0][INDEX["passes"]] for job in (llama(), with_typed_values, interleaved)]
    assert passes == [0, 1, 2]


def test_with_a_pipeline_one_chunks_gradients_stay_in_sight() -> None:
    """Beside the other chunks travels the rest: with pp2 a half less for two chunks, nothing beside for one; without a pipeline
    nothing."""
    for words, share in ((), 0.0), (("parallel.pipeline=2",), 0.0), (("parallel.pipeline=2", "parallel.virtual_pipeline=2"), 0.5):
        work = step_work(llama("zero.overlap_grad_reduce=true", *words))[0]
        data, beside = work[INDEX["data"]], work[INDEX["data_beside"]]
        assert data > 0 and beside / (data + beside) == pytest.approx(share)


def test_layers_and_experts_in_other_formats() -> None:
    """fp4 but for the last 8 of 32 layers: three quarters of the layers' products. fp8 in experts alone: the rest in bf16."""
    job = replace(llama(), compute="fp4")
    full, part = (stage_micro_work(each)[0] for each in (job, replace(job, wide_layers=8)))
    assert part[INDEX["products_fp4"]] == pytest.approx(0.75 * full[INDEX["products_fp4"]])
    assert part[INDEX["gemm"]] > full[INDEX["gemm"]] > 0
    config = config_of("qwen3_30b_a3b", "batch.global_batch_seqs=128")
    moe = stage_micro_work(replace(make_job(config, config.model.vocab_size), compute="fp8", experts_only=True))[0]
    assert moe[INDEX["gemm_fp8"]] == 0 < moe[INDEX["gemm"]] and moe[INDEX["experts"]] == 0 < moe[INDEX["experts_fp8"]]
