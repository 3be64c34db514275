"""The ledger against published bytes, and its laws."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.model_schema import Attention, Model
from parallel.flops import count_parameters
from parallel.layout import Layout
from parallel.memory.activations import attention_bytes, in_flight
from parallel.memory.hardware import PlannedMachine, find_gpu
from parallel.memory.job import BytesPerParameter, PlannedJob, Recomputation, ZeroSharding, make_job
from parallel.memory.ledger import make_ledger
from parallel.memory.weights import RankParameters, stage_held, state_bytes
from tests.tools.planner.conftest import config_of

H100 = find_gpu("H100")
assert H100 is not None
MACHINE = PlannedMachine(H100, 8, 50.0)
MODEL = Model(num_layers=16, hidden_size=1024, attention=Attention(num_heads=16))


def job_of(layout: Layout, model: Model = MODEL, **changes: object) -> PlannedJob:
    job = PlannedJob(model=model, vocab=32000, layout=layout, machine=MACHINE, seq_length=2048, micro_batch=1, global_batch=64)
    return replace(job, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("stage", "total_gb"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_paper(stage: int, total_gb: float) -> None:
    """arXiv 1910.02054, figure 1: 7.5 billion parameters on 64 ranks."""
    job = job_of(Layout(nodes=8, processes_per_node=8), states=BytesPerParameter(2, 2, 12), zero=ZeroSharding("deepspeed", stage))
    assert state_bytes(job, RankParameters(7.5e9)).total / 1e9 == pytest.approx(total_gb, abs=0.05)


def test_deepseek_v3_states() -> None:
    """arXiv 2603.07685: 36.4 GB weights and gradients, 32.1 GB optimizer a GPU at 256 GPUs, pp4 vpp4 ep64 (15 layers a stage)."""
    split = [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 3, 4, 3]
    words = [
        "launch.nodes=32",
        "parallel.pipeline=4",
        "parallel.virtual_pipeline=4",
        "parallel.expert=64",
        "model.mtp.num_layers=1",
    ]
    config = config_of("deepseek_v3", *words, f"parallel.pipeline_split={split}", "batch.global_batch_seqs=4096")
    job = make_job(config, config.model.vocab_size)
    held = stage_held(job)[1]
    states = state_bytes(job, held)
    assert (states.weights + states.gradients) / 1e9 == pytest.approx(36.4, rel=0.02)
    assert states.optimizer / 1e9 == pytest.approx(32.1, rel=0.02)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=2, pipeline=4, nodes=8), Layout(pipeline=2, virtual_pipeline=2, nodes=4)]
)
def test_ranks_hold_the_model_once(layout: Layout) -> None:
    """Over stages and tensor ranks the divided parameters add up to the model, the whole ones count once a tensor rank."""
    job = job_of(layout)
    held = sum(stage.total for stage in stage_held(job)) * layout.tensor
    parameters = count_parameters(MODEL, job.padded_vocab)
    assert held == parameters.total + (layout.tensor - 1) * parameters.norms


def test_an_indexer_is_whole_on_every_tensor_rank() -> None:
    """DeepSeek-V3.2 at tp8 against the same model without its indexer: weights, and activations by hand for one layer."""
    words = ("launch.nodes=32", "parallel.tensor=8", "parallel.expert=32", "parallel.pipeline=4", "batch.global_batch_seqs=64",
             "batch.seq_length_tokens=4096")  # fmt: skip
    configs = [config_of("deepseek_v3_2", *words, word) for word in ("run.steps=1", "model.dsa.top_k=null")]
    sparse, dense = (make_job(config, config.model.vocab_size) for config in configs)
    layers = len(sparse.stage_chunks[1][0].layers)
    assert sparse.stage_chunks == dense.stage_chunks
    assert stage_held(sparse)[1].total - stage_held(dense)[1].total == layers * (1536 * 8192 + 7168 * (128 + 64) + 2 * 128)
    # bf16: 64 queries of 128, a key twice, 64 weights, gathered inputs; an int32 and an fp32 for each of the 2048 chosen keys.
    kept = 2 * (64 * 128 + 2 * 128 + 64 + 7168 + 1536) + 8 * 2048
    assert attention_bytes(sparse) - attention_bytes(dense) == kept


def test_deepspeed_estimates() -> None:
    """DeepSpeed docs (memory.rst): zero-2 4P + 16P/N, zero-3 18P/N of P = 2,851 million at 16 GPUs, buffers apart."""
    held, layout = RankParameters(2851e6), Layout(nodes=2, processes_per_node=8)
    two = state_bytes(job_of(layout, states=BytesPerParameter(2, 2, 14), zero=ZeroSharding("deepspeed", 2)), held).total
    assert two == pytest.approx(2851e6 * (2 + 16 / 16))
    three = state_bytes(job_of(layout, states=BytesPerParameter(2, 4, 12), zero=ZeroSharding("deepspeed", 3)), held).total
    assert three == pytest.approx(18 * 2851e6 / 16)


def test_offload_moves_bytes_to_the_host() -> None:
    layout = Layout(nodes=2, processes_per_node=8)
    kept = state_bytes(job_of(layout, zero=ZeroSharding("deepspeed", 2)), RankParameters(1e9))
    moved = state_bytes(job_of(layout, zero=ZeroSharding("deepspeed", 2, "optimizer")), RankParameters(1e9))
    # Beside the optimizer the host holds an fp32 gradient and a copy of its part of the weights.
    assert moved.optimizer == 0 and moved.weights == kept.weights and moved.gradients == kept.gradients
    assert moved.host == pytest.approx(kept.optimizer + (4 + 2) * 1e9 / 16)


@pytest.mark.parametrize(
    ("pp", "vpp", "micro", "want"), [(4, 1, 16, [4, 3, 2, 1]), (4, 2, 16, [11, 9, 7, 5]), (4, 1, 2, [2, 2, 2, 1])]
)
def test_in_flight(pp: int, vpp: int, micro: int, want: list[int]) -> None:
    job = job_of(Layout(pipeline=pp, virtual_pipeline=vpp, nodes=pp), global_batch=micro)
    assert [in_flight(job, stage) for stage in range(pp)] == want


def peak(job: PlannedJob) -> float:
    return make_ledger(job, 1.0).peak_gib


def test_laws() -> None:
    """More sharding or recomputation never needs more; more tokens never need less."""
    job = job_of(Layout(tensor=2, sequence=True, nodes=16), micro_batch=2)
    for stage in (0, 1, 2):
        engine = replace(job, zero=ZeroSharding("deepspeed", stage))
        held = stage_held(job)[0]
        assert (
            state_bytes(replace(engine, zero=ZeroSharding("deepspeed", stage + 1)), held).total <= state_bytes(engine, held).total
        )
    selective = replace(job, recompute=Recomputation("selective", frozenset({"layernorm", "mlp"})))
    assert peak(replace(job, recompute=Recomputation("full"))) < peak(selective) < peak(job)
    assert peak(replace(job, micro_batch=4)) > peak(job)
    assert peak(replace(job, flash=False)) > peak(job)


def test_range_encloses_estimate() -> None:
    config = config_of("qwen3_30b_a3b", "launch.nodes=2", "parallel.expert=16", "batch.global_batch_seqs=64")
    for rank in make_ledger(make_job(config, config.model.vocab_size)).ranks:
        assert rank.low_gib < rank.total_gib < rank.high_gib
        parts = (rank.weights_gib, rank.gradients_gib, rank.optimizer_gib, rank.activations_gib, rank.buffers_gib)
        assert sum(parts) == pytest.approx(rank.total_gib)
