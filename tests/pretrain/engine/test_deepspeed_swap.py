"""Optimizer state on NVMe: trained like in one process, saved and restored bit by bit, refused where it can't be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.load import load_config
from configs.schema import Config
from pretrain.preflight import nvme
from pretrain.preflight.nvme import check_nvme
from tests.pretrain.deepspeed_world import Keys, zero
from tests.pretrain.engine.test_deepspeed_state import fill, make, same, spoiled, spread
from tests.pretrain.model.test_parity import EP, PP, TP, check
from tests.pretrain.world import assemble, batches_of, owned_values, small_config
from tests.ranks import run_ranks

SWAP = ["zero={engine: deepspeed, stage: 3, offload: optimizer, offload_device: nvme}"]


@pytest.fixture(scope="module")
def can_swap(deepspeed_imported: None) -> None:
    if problems := nvme.compiler_problems():
        pytest.skip(problems[0].rule)
    from parallel.compat.deepspeed.operators import build_async_io  # noqa: PLC0415  (after the fixture before)

    build_async_io()


@pytest.fixture
def disk(can_swap: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """Swaps below a temporary folder, in several sub-groups, updated by torch's AdamW (nothing more to compile)."""
    monkeypatch.setattr("pretrain.engine.deepspeed_runtime.can_compile", lambda: False)
    monkeypatch.setattr("pretrain.engine.deepspeed_swap._GROUP_ELEMENTS", 8000)
    return zero(3, zero__offload="optimizer", zero__offload_device="nvme", zero__nvme_path=str(tmp_path))


def swapped(config: Config) -> tuple[int, int]:
    """(sub-groups in files, all of them)."""
    engine: Any = make(config)[0]
    zero_optimizer = engine.partition.zero
    groups = range(len(zero_optimizer.fp16_groups))
    assert all(
        not len(zero_optimizer.fp32_partitioned_groups_flat[group]) for group in groups if engine.partition._is_swapped(group)
    )
    return sum(engine.partition._is_swapped(group) for group in groups), len(groups)


@pytest.mark.prove
@pytest.mark.parametrize(
    ("world", "axes"), [(1, {}), (2, {EP: 2}), (2, {"zero__offload": "param"}), (4, {TP: 2, PP: 2})], ids=str
)
def test_swapped_state_trains_like_one_process(world: int, axes: Keys, disk: Keys) -> None:
    check(world, {**disk, **axes}, {})


@pytest.mark.prove
def test_widths_that_fill_no_blocks(disk: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one sub-group, whose parameters begin anywhere."""
    monkeypatch.setattr("pretrain.engine.deepspeed_swap._GROUP_ELEMENTS", 100_000_000)
    check(1, disk, {"model__hidden_size": 40, "model__ffn_hidden_size": 56, "model__moe__first_dense_layers": 1})


@pytest.mark.prove
def test_the_state_is_in_files(disk: Keys) -> None:
    in_files, groups = run_ranks(1, swapped, small_config(**disk))[0]
    assert in_files >= 4 and in_files >= groups - 2, "all but the smallest vectors"


@pytest.mark.prove
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopping_and_going_on_equals_going_through(precision: str, disk: Keys) -> None:
    keys = {EP: 2, **disk, "precision__params": precision}
    half = spread(2, keys, None, 0, 2)[2]
    _, losses, resumed = spread(2, keys, half, 2, 4)
    _, all_losses, through = spread(2, keys, None, 0, 4)
    assert losses == all_losses[2:] and same(resumed, through)


@pytest.mark.prove
def test_another_engines_state_goes_to_the_files_and_back(disk: Keys) -> None:
    trained = spread(1, {}, None, 0, 2)[2]
    before, _, after = spread(2, disk, trained, 2, 3)
    assert same(before, trained)
    assert same(spread(1, {}, after, 3, 3)[0], after)


def returned(config: Config) -> bool:
    """The state of step 1 is put back after step 2, as a rollback does: are the weights and moments those of step 1?"""
    engine, groups = make(config)
    states = []
    for step in range(2):
        engine.step(batches_of(config, step, groups.dp.rank(), groups.dp.size()), 3e-3)
        states.append(owned_values(engine))
    fill(engine, assemble([states[0]]), True, 1)
    back = owned_values(engine)
    assert any(not np.array_equal(states[0][key], states[1][key]) for key in back)
    return all(np.array_equal(states[0][key], back[key]) for key in back)


@pytest.mark.prove
def test_a_rollback_reaches_the_files(disk: Keys) -> None:
    assert run_ranks(1, returned, small_config(**disk))[0]


@pytest.mark.prove
def test_a_step_that_is_not_finite_changes_nothing(disk: Keys) -> None:
    ranks = run_ranks(2, spoiled, small_config(launch__processes_per_node=2, **{EP: 2}, **disk))
    assert all(applied == [True, False, True] and untouched for applied, untouched, _ in ranks)


# What this machine must have.


def test_a_missing_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("quickstart", [*SWAP, f"zero.nvme_path={tmp_path}"]).config
    monkeypatch.setenv("CXX", "no-such-compiler")
    (problem,) = check_nvme(config)
    assert problem.path == "zero.offload_device" and "no-such-compiler not found" in problem.rule
    assert "libaio-dev" in problem.fix and "zero.offload_device=cpu" in problem.fix


def test_a_missing_libaio_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that finds nothing says what it didn't find."""
    config = load_config("quickstart", [*SWAP, f"zero.nvme_path={tmp_path}"]).config
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\necho 'fatal error: libaio.h: No such file or directory' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(nvme.shutil, "which", lambda name: name)
    (problem,) = check_nvme(config)
    assert "libaio.h: No such file" in problem.rule


def test_the_folder_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "compiler_problems", lambda: [])
    missing = tmp_path / "missing"
    (problem,) = check_nvme(load_config("quickstart", [*SWAP, f"zero.nvme_path={missing}"]).config)
    assert problem.path == "zero.nvme_path" and problem.got == str(missing)
    assert check_nvme(load_config("quickstart", [*SWAP, f"zero.nvme_path={tmp_path}"]).config) == []
    assert not os.listdir(tmp_path)


def test_nothing_is_asked_of_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "compiler_problems", lambda: 1 / 0)
    assert check_nvme(load_config("quickstart", ["zero={engine: deepspeed, stage: 3, offload: optimizer}"]).config) == []
