"""Muon's update against the definition in float64 and against torch's own; the plan of the exchange; the matrices of a model."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from configs.schema import Config
from parallel.architecture import LayerKind
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.muon import split_rows, updates_with_muon
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_engine, make_model
from pretrain.engine import megatron
from pretrain.engine.base import WEIGHT
from pretrain.engine.matrix_exchange import MatrixPiece, plan_waves
from pretrain.engine.muon import Muon
from pretrain.engine.newton_schulz import COEFFICIENTS, newton_schulz
from pretrain.engine.slots import Slot
from pretrain.model.shards import Shard
from pretrain.model.tensor_slice import TensorSlice
from tests.pretrain.world import VOCAB, assemble, batches_of, largest_difference, small_config
from tests.ranks import run_ranks
from tools.convert.tensors.canonical_shapes import layer_shapes

RATE, STEPS, NAME = 0.02, 3, "decoder.layers.0.mlp.linear_fc2.weight"


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("kind", ["jordan", "quintic"])
def test_the_iterations_are_their_polynomial_of_the_singular_values(shape: tuple[int, int], kind: str) -> None:
    """K. Jordan 2024: each step maps every singular value s to a s + b s³ + c s⁵ and keeps the singular vectors."""
    matrix = np.random.default_rng(3).normal(size=shape)
    left, values, right = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
    for step in range(5):
        a, b, c = COEFFICIENTS[kind][step % len(COEFFICIENTS[kind])]
        values = a * values + b * values**3 + c * values**5
    got = newton_schulz(torch.tensor(matrix, dtype=torch.float32)[None], COEFFICIENTS[kind], 5, torch.float32)[0]
    assert np.abs(got.numpy() - (left * values) @ right).max() < 1e-5
    assert values.min() > 0.6 and values.max() < 1.3


def muon_config(**changes: Any) -> Config:
    return small_config(optimizer__kind="muon", **{f"optimizer__muon__{key}": value for key, value in changes.items()})


def whole_slot(shape: tuple[int, int], main: torch.Tensor, start: int, stop: int) -> Slot:
    shard = Shard(NAME, shape, (TensorSlice((0, 0), shape),), 0, 1, 0, False)
    return Slot(shard, main, start, stop)


def gradient_of(step: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def updated(config: Config, shape: tuple[int, int], wave_elements: int) -> np.ndarray:
    """On a forked rank: this rank's equal part of a matrix after three steps, whatever the number of ranks."""
    rank, size = dist.get_rank(), shape[0] * shape[1] // dist.get_world_size()
    start, stop = rank * size, (rank + 1) * size
    slot = whole_slot(shape, gradient_of(99, shape).flatten()[start:stop].clone(), start, stop)
    group, device = dist.group.WORLD, torch.device("cpu")
    assert group is not None
    muon = Muon(config, [slot], [slot.shard], group, device, wave_elements)
    for step in range(STEPS):
        muon.step({id(slot): gradient_of(step, shape).flatten()[start:stop]}, RATE)
    return slot.main.numpy()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "torchs"), [("match_rms", "match_rms_adamw"), ("spectral", "original")])
def test_the_update_is_torchs(nesterov: bool, scale: str, torchs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon, which iterates in bf16 only, is made to iterate in fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    shape = (40, 24)
    weight = torch.nn.Parameter(gradient_of(99, shape))
    optimizer = torch.optim.Muon([weight], lr=RATE, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=torchs)
    for step in range(STEPS):
        weight.grad = gradient_of(step, shape)
        optimizer.step()
    config = muon_config(nesterov=nesterov, scale=scale, ns_dtype="fp32")
    (got,) = run_ranks(1, updated, config, shape, 1 << 20)
    assert np.abs(got.reshape(shape) - weight.detach().numpy()).max() < 1e-6


def test_a_matrix_cut_over_ranks_gets_the_same_update() -> None:
    config, shape = muon_config(ns_dtype="fp32"), (15, 16)
    (want,) = run_ranks(1, updated, config, shape, 1 << 20)
    got = np.concatenate(run_ranks(3, updated, config, shape, 1 << 20))
    assert np.array_equal(got, want)


def random_stage(rng: random.Random) -> tuple[list[list[MatrixPiece]], list[int]]:
    """Matrices of a stage: each is cut into rows' blocks, and each block is whole on several ranks or cut over them."""
    num_ranks, sizes = rng.choice([1, 2, 4]), []
    ranks: list[list[MatrixPiece]] = [[] for _ in range(num_ranks)]
    for matrix in range(rng.randrange(1, 9)):
        rows, columns = 4 * rng.randrange(1, 4), rng.randrange(2, 7)
        sizes.append(rows * columns)
        slice_ = TensorSlice((0, 0), (rows, columns))
        if rng.random() < 0.5:
            for pieces in ranks:
                pieces.append(MatrixPiece(matrix, slice_, 0, sizes[-1]))
            continue
        length = -(-sizes[-1] // num_ranks)
        for rank in range(num_ranks):
            if rank * length < sizes[-1]:
                ranks[rank].append(MatrixPiece(matrix, slice_, rank * length, min((rank + 1) * length, sizes[-1])))
    return ranks, sizes


@pytest.mark.parametrize("seed", range(20))
def test_every_matrix_is_solved_once_and_every_piece_comes_back(seed: int) -> None:
    rng = random.Random(seed)
    ranks, sizes = random_stage(rng)
    limit = rng.choice([1, 60, 10**9])
    plans = [plan_waves(ranks, me, sizes, [float(size) for size in sizes], limit) for me in range(len(ranks))]
    assert len({len(waves) for waves in plans}) == 1, "every rank takes part in every wave"
    assert sorted(matrix for waves in plans for wave in waves for matrix in wave.owned) == list(range(len(sizes)))
    for number in range(len(plans[0])):
        for sender, waves in enumerate(plans):
            for receiver, others in enumerate(plans):
                sent = [ranks[sender][index] for index in waves[number].send[receiver]]
                assert sent == others[number].receive[sender], "both sides name the same pieces in the same order"
                back = [ranks[receiver][index] for index in others[number].receive_back[sender]]
                assert back == waves[number].send_back[receiver]
        if limit == 10**9:
            assert number == 0
    for pieces, waves in zip(ranks, plans, strict=True):
        returned = sorted(index for wave in waves for indices in wave.receive_back for index in indices)
        assert returned == list(range(len(pieces)))
        for wave in waves:
            arrived = [piece for part in wave.receive for piece in part]
            assert sum(piece.size for piece in arrived) == sum(sizes[matrix] for matrix in wave.owned)
            assert len(wave.owned) <= 1 or sum(sizes[matrix] for matrix in wave.owned) <= limit


def test_which_tensors_are_muons() -> None:
    optimizer = muon_config().optimizer
    for name, shape, is_muons in (
        ("embedding.word_embeddings.weight", (300, 32), False),
        ("output_layer.weight", (300, 32), False),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (96, 32), True),
        ("decoder.layers.0.self_attention.linear_qkv.bias", (96,), False),
        ("decoder.layers.0.self_attention.q_layernorm.weight", (12,), False),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight", (8, 48, 32), True),
        ("decoder.layers.0.mlp.experts.linear_fc1.bias", (8, 48), False),
        ("decoder.layers.0.mlp.router.weight", (8, 32), False),
        ("decoder.layers.0.mlp.shared_experts.gate_weight", (1, 32), False),
        ("decoder.layers.0.self_attention.conv1d.weight", (64, 4, 4), False),
        ("mtp.layers.0.eh_proj.weight", (32, 64), True),
    ):
        assert updates_with_muon(name, shape, optimizer) == is_muons, name
    optimizer.muon.router = "muon"
    assert updates_with_muon("decoder.layers.0.mlp.router.weight", (8, 32), optimizer)


@pytest.mark.parametrize("split", ["none", "qkv", "head"])
def test_the_matrices_of_a_tensor_partition_its_rows(split: str) -> None:
    config = muon_config(split_heads=split)
    attention = config.model.attention
    width, groups = 12, attention.num_query_groups or 0
    found = split_rows(
        "decoder.layers.0.self_attention.linear_qkv.weight", (4 + 2 * groups) * width, config.model, config.optimizer.muon
    )
    rows = sorted(row for runs in found for start, stop in runs for row in range(start, stop))
    assert rows == list(range((4 + 2 * groups) * width))
    assert len(found) == {"none": 1, "qkv": 3, "head": 8}[split]
    if split == "qkv":
        # Two groups of two query heads, a key and a value.
        assert found[1] == ((24, 36), (72, 84)) and found[2] == ((36, 48), (84, 96))
    assert split_rows("decoder.layers.0.mlp.linear_fc1.weight", 112, config.model, config.optimizer.muon) == [
        ((0, 56),),
        ((56, 112),),
    ]
    config.model.mla.kv_lora_rank, config.model.mla.qk_nope_head_dim, config.model.mla.v_head_dim = 16, 5, 3
    keys = split_rows("decoder.layers.0.self_attention.linear_kv_up_proj.weight", 32, config.model, config.optimizer.muon)
    assert len(keys) == (8 if split == "head" else 1)


def weights_after(config: Config, by_megatron_core: bool) -> dict[str, np.ndarray]:
    """On one forked rank: the weights after four steps, updated by our Muon or by Megatron-Core's own."""
    if by_megatron_core:
        # Its Triton kernels are for GPUs, and importing them needs Triton.
        sys.modules.setdefault("emerging_optimizers.triton_kernels", ModuleType("triton_kernels"))
        muon = importlib.import_module("megatron.core.optimizer.muon")

        def make(options: Any, models: Any, **_: Any) -> Any:
            values = {"momentum": 0.95, "use_nesterov": True, "num_ns_steps": 5, "split_qkv": True, "scale_mode": "spectral"}
            values |= {"extra_scale_factor": 0.2, "fp32_matmul_prec": "highest", "tp_mode": "duplicated"}
            for name, value in values.items():
                setattr(options, f"muon_{name}", value)
            return muon.get_megatron_muon_optimizer(options, models, use_gloo_process_groups=False)

        megatron.get_megatron_optimizer = make
    layout = make_layout(config)
    runtime = start({"RANK": "0", "WORLD_SIZE": "1"})
    groups = make_groups(layout, config.run.seed)
    chunks = make_chunks(config.model, 1, 1, VOCAB, None)
    engine = make_engine(config, make_model(config, VOCAB, layout, chunks, groups, runtime.device), groups, runtime.device)
    for step in range(4):
        engine.step(batches_of(config, step, 0, 1), 3e-3)
    found: dict[Any, np.ndarray] = {}
    for part in engine.owned_state():
        if part.kind == WEIGHT:
            found[(part.kind, part.name, part.global_shape, part.tensor_slice, part.start, part.stop)] = (
                part.data.detach().numpy()
            )
    return {name: value.copy() for (_, name), value in assemble([found]).items()}


@pytest.mark.skipif(
    importlib.util.find_spec("emerging_optimizers") is None,
    reason="Megatron-Core's Muon needs emerging-optimizers 0.1.0, which no package registry has: put its source on PYTHONPATH",
)
def test_the_weights_are_those_of_megatron_cores_own_muon() -> None:
    """It has no split of gate and up projection, updates routers too, and takes the quintic coefficients."""
    ours = {"router": "muon", "split_gate": False, "ns_coefficients": "quintic", "ns_dtype": "fp32"}
    model = {"model__moe__grouped_gemm": "off", "model__mtp__num_layers": 1, "zero__stage": 0}
    changes = {f"optimizer__muon__{key}": value for key, value in ours.items()} | model
    (got,) = run_ranks(1, weights_after, small_config(optimizer__kind="muon", **changes), False)
    (want,) = run_ranks(1, weights_after, small_config(**changes), True)
    (adamw,) = run_ranks(1, weights_after, small_config(**changes), False)
    assert largest_difference(got, want)[0] < 2e-6
    assert largest_difference(got, adamw)[0] > 1e-2


@pytest.mark.parametrize("split", ["none", "qkv", "head"])
def test_the_matrices_of_a_hybrid_partition_its_rows(split: str) -> None:
    net = {"pattern": [1, 0], "num_key_heads": 2, "num_value_heads": 6, "key_head_dim": 10, "value_head_dim": 7}
    changes = {f"model__delta_net__{key}": value for key, value in net.items()}
    config = small_config(
        optimizer__kind="muon", optimizer__muon__split_heads=split, model__attention__output_gate=True, **changes
    )
    shapes = dict(layer_shapes(config.model, LayerKind(False, True))) | dict(layer_shapes(config.model, LayerKind(False)))
    counts = {"self_attention.linear_in.weight": (1, 6, 18), "self_attention.linear_qkv.weight": (1, 4, 12)}
    for name, expected in counts.items():
        found = split_rows(name, shapes[name][0], config.model, config.optimizer.muon)
        rows = sorted(row for runs in found for start, stop in runs for row in range(start, stop))
        assert rows == list(range(shapes[name][0]))
        assert len(found) == expected[("none", "qkv", "head").index(split)]
    for name in counts:
        assert updates_with_muon(name, shapes[name], config.optimizer)
    for name in ("conv1d.weight", "out_norm.weight", "A_log"):
        name = f"self_attention.{name}"
        assert not updates_with_muon(name, shapes[name], config.optimizer)
