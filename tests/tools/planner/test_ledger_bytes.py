"""The ledger against bytes: what real engines hold on forked ranks is what the planner says of that rank's stage."""

from __future__ import annotations

import os

import pytest

from configs.schema import Config
from parallel.memory.hardware import PlannedMachine, find_gpu
from parallel.memory.job import PlannedJob, make_job
from parallel.memory.ledger import BUCKET_ELEMENTS, bucket_bytes
from parallel.memory.weights import StateBytes, stage_held, state_bytes
from tests.pretrain.deepspeed_world import Keys, name_of, zero
from tests.pretrain.world import small_config
from tests.ranks import run_ranks

TP, PP, EP = (f"parallel__{name}" for name in ("tensor", "pipeline", "expert"))
OFFLOAD: Keys = {"zero__offload": "optimizer"}
MUON: Keys = {"optimizer__kind": "muon"}
VOCAB = 512
# Matrices of over 100,000 elements: DeepSpeed's stage 3 keeps smaller ones gathered, which real models have next to none of.
SIZES: Keys = {
    "model__num_layers": 2, "model__hidden_size": 256, "model__ffn_hidden_size": 448, "model__attention__head_dim": 112,
    "model__moe__num_experts": 4, "model__moe__ffn_hidden_size": 416, "model__vocab_size": VOCAB, "run__steps": 2,
    "precision__params": "bf16",
}  # fmt: skip
# Megatron-Core's buckets begin at multiples of 64 to 256 elements, DeepSpeed's partitions are equal; norms stay gathered at
# stage 3; step counts and scalars.
PADDING = 0.01
LAYOUTS: list[tuple[int, Keys]] = [
    (2, {PP: 2, "zero__stage": 0}),
    (4, {TP: 2, EP: 2, "zero__stage": 1}),
    (2, {"precision__params": "fp32", **zero(0)}),
    (2, {TP: 2, EP: 2, **zero(1)}),
    (4, {PP: 2, **zero(2)}),
    (2, {EP: 2, **zero(3)}),
    (2, {**zero(2), **OFFLOAD}),
    (4, {TP: 2, EP: 2, "zero__stage": 1, **MUON}),
]
MORE_LAYOUTS: list[tuple[int, Keys]] = [
    (4, {TP: 2, "zero__stage": 0}),
    (4, {PP: 2, EP: 2, "zero__stage": 1}),
    (4, {TP: 2, PP: 2, **zero(1)}),
    (4, {PP: 2, EP: 2, **zero(2)}),
    (4, {PP: 2, EP: 2, **zero(3)}),
    (2, {**zero(1), **OFFLOAD}),
    (2, {**zero(3), **OFFLOAD}),
    (2, {EP: 2, **zero(2), **MUON}),
    (2, {EP: 2, **zero(3), **MUON}),
]


@pytest.fixture(scope="module")
def imported() -> None:
    """Forked ranks find Megatron-Core and DeepSpeed imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import pretrain.engine.deepspeed  # noqa: F401, PLC0415  (after the line above)


def job_of(config: Config, world: int) -> PlannedJob:
    gpu = find_gpu("H100")
    assert gpu is not None
    config.launch.processes_per_node = world
    return make_job(config, VOCAB, PlannedMachine(gpu, 8, 50.0))


def compare(job: PlannedJob, got: dict[str, int], states: StateBytes, bucket: float) -> dict[str, tuple[int, float]]:
    """name → (held, said) where they differ by more than padding. Offload moves to the host what these ranks hold, too."""
    said = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
    }
    wrong = {name: (got[name], want) for name, want in said.items() if want and abs(got[name] / want - 1) > PADDING}
    everything = sum(got[name] for name in ("weights", "gradients", "optimizer", "host", "other"))
    if abs(everything / (states.total + states.host) - 1) > 2 * PADDING:
        wrong["all"] = (everything, states.total + states.host)
    if got["buckets"] > bucket or (job.zero.stage == 3 and got["buckets"] < bucket):
        wrong["buckets"] = (got["buckets"], bucket)
    return wrong


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=name_of)
def test_ranks_hold_what_the_ledger_says(world: int, layout: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's Adam where DeepSpeed's would be compiled first, for minutes; it holds the same state.
    monkeypatch.setattr("pretrain.engine.deepspeed_runtime.can_compile", lambda: False)
    check(world, layout)


@pytest.mark.prove
@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(("world", "layout"), MORE_LAYOUTS, ids=name_of)
def test_more_ranks_hold_what_the_ledger_says(world: int, layout: Keys) -> None:
    check(world, layout)


def check(world: int, layout: Keys) -> None:
    from tests.tools.planner.held_bytes import held_bytes  # noqa: PLC0415  (the engines, imported by the fixture)

    config = small_config(**{**SIZES, **layout})
    job = job_of(config, world)
    states = [state_bytes(job, held) for held in stage_held(job)]
    buckets = [bucket_bytes(job, held) for held in stage_held(job)]
    for rank, got in enumerate(run_ranks(world, held_bytes, config)):
        wrong = compare(job, got, states[got["stage"]], buckets[got["stage"]])
        assert not wrong, f"rank {rank}: {wrong}; held {got}"


@pytest.mark.usefixtures("imported")
def test_buckets_have_the_size_that_the_ledger_says() -> None:
    from pretrain.engine import deepspeed_runtime  # noqa: PLC0415  (DeepSpeed's import takes 3 s)

    settings = deepspeed_runtime.engine_settings(small_config(**zero(2)), False)
    assert settings["zero_optimization"]["reduce_bucket_size"] == BUCKET_ELEMENTS
