"""The checkpoint's files: streamed safetensors, sums that catch damage, slices that fit any layout."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pretrain.checkpoint.manifest import Manifest, check_identity, parse_key, read_manifest, slice_key
from pretrain.checkpoint.read import CheckpointReader
from pretrain.checkpoint.tensor_file import DamagedFile, UnfitFile, read_bytes, read_header, write_tensor_file
from pretrain.checkpoint.write import CheckpointWriter, prune, remove_leftovers
from pretrain.engine.base import StateSlice
from pretrain.model.tensor_slice import TensorSlice
from pretrain.run.folder import COMPLETE, complete_checkpoints, step_folder
from tests.ranks import run_ranks

ROWS, COLUMNS = 12, 10
FULL = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)


def manifest(step: int) -> Manifest:
    return Manifest(
        format=1, step=step, consumed_samples=0, tokens=0, optimizer_steps=step, horizon_steps=None, engine="megatron",
        zero_stage=1, layout={}, model={"num_layers": 2}, vocab_size=10, tokenizer={"sha256": "a"}, data=None, config={},
        kinds=("weight",), tensors={"w": {"shape": [ROWS, COLUMNS], "dtype": "F32"}}, files={}, world_size=1,
    )  # fmt: skip


def state_slice(slice_: TensorSlice, start: int, stop: int, fill: bool) -> StateSlice:
    values = FULL[slice_.slices_of(TensorSlice((0, 0), (ROWS, COLUMNS)))].flatten()[start:stop]
    return StateSlice(
        "weight", "w", (ROWS, COLUMNS), slice_, start, stop, values.clone() if fill else torch.full((stop - start,), -1.0)
    )


def sharded(rank: int, world: int, dim: int, cuts: int) -> list[tuple[TensorSlice, int, int]]:
    """This rank's share of w: split over tensor ranks on `dim`, each part flat over `cuts` data ranks."""
    tensor, data = divmod(rank, cuts)
    size = (ROWS, COLUMNS)[dim] // (world // cuts)
    offset, shape = [0, 0], [ROWS, COLUMNS]
    offset[dim], shape[dim] = tensor * size, size
    slice_ = TensorSlice((offset[0], offset[1]), (shape[0], shape[1]))
    length = -(-slice_.size // cuts)
    return [(slice_, min(data * length, slice_.size), min((data + 1) * length, slice_.size))]


def save(folder: str, dim: int, cuts: int, asynchronous: bool, step: int = 3) -> str | None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    writer = CheckpointWriter(Path(folder), rank, asynchronous)
    writer.start(
        manifest(step), [state_slice(slice_, start, stop, True) for slice_, start, stop in sharded(rank, world, dim, cuts)]
    )
    return writer.finish()[1]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("world", "dim", "cuts"), [(4, 0, 2), (4, 1, 2), (3, 0, 3), (2, 1, 1), (1, 0, 1)])
def test_any_layout_reads_what_any_other_wrote(tmp_path: Path, world: int, dim: int, cuts: int, asynchronous: bool) -> None:
    assert run_ranks(world, save, str(tmp_path), dim, cuts, asynchronous) == [None] * world
    reader = CheckpointReader(step_folder(tmp_path, 3))
    for other_world, other_dim, other_cuts in [(1, 0, 1), (6, 0, 2), (10, 1, 2), (5, 1, 1), (7, 0, 7)]:
        for rank in range(other_world):
            for slice_, start, stop in sharded(rank, other_world, other_dim, other_cuts):
                wanted, got = state_slice(slice_, start, stop, True), state_slice(slice_, start, stop, False)
                reader.fill([got])
                assert torch.equal(got.data, wanted.data)


def test_files_are_safetensors_that_other_tools_read(tmp_path: Path) -> None:
    run_ranks(2, save, str(tmp_path), 0, 1, False)
    with safe_open(step_folder(tmp_path, 3) / "rank_00001.safetensors", "pt") as file:
        (key,) = file.keys()
        assert key == "weight:w[6:12,0:10]"
        assert torch.equal(file.get_tensor(key), FULL[6:].flatten())


def test_streamed_file_round_trips_every_type(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = [np.arange(6, dtype=np.uint8), np.arange(3, dtype=np.float32).view(np.uint8), np.zeros(0, dtype=np.uint8)]
    heads = [("bytes", "U8", (2, 3)), ("floats", "F32", (3,)), ("none", "F32", (0, 4))]
    written = write_tensor_file(path, heads, iter(values))
    assert path.stat().st_size == written.num_bytes
    header = read_header(path)
    assert {key: (entry.dtype, entry.shape) for key, entry in header.items()} == {h[0]: (h[1], h[2]) for h in heads}
    for (key, _, _), value in zip(heads, values, strict=True):
        assert np.array_equal(read_bytes(path, header[key], written.sums[key]), value)


def test_keys_name_slices_both_ways() -> None:
    for slice_, start, stop in [
        (TensorSlice((0,), (5,)), 0, 5),
        (TensorSlice((2, 3), (4, 5)), 7, 20),
        (TensorSlice((), ()), 0, 1),
    ]:
        key = slice_key("exp_avg", "decoder.layers.3.mlp.weight", slice_, start, stop)
        assert parse_key(key) == ("exp_avg", "decoder.layers.3.mlp.weight", slice_, start, stop)


@pytest.mark.parametrize("fault", ["flip", "truncate", "missing", "marker", "manifest", "index"])
def test_damage_is_found(tmp_path: Path, fault: str) -> None:
    run_ranks(2, save, str(tmp_path), 0, 1, True)
    folder = step_folder(tmp_path, 3)
    victim = folder / "rank_00001.safetensors"
    if fault == "flip":
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    elif fault == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif fault == "missing":
        victim.unlink()
    elif fault == "marker":
        (folder / COMPLETE).unlink()
    else:
        (folder / f"{fault}.json").write_text("{")
    with pytest.raises(DamagedFile):
        CheckpointReader(folder).fill([state_slice(TensorSlice((0, 0), (ROWS, COLUMNS)), 0, ROWS * COLUMNS, False)])


def test_missing_slices_are_no_damage_but_another_config(tmp_path: Path) -> None:
    run_ranks(1, save, str(tmp_path), 0, 1, True)
    reader = CheckpointReader(step_folder(tmp_path, 3))
    absent = StateSlice("weight", "other", (4,), TensorSlice((0,), (4,)), 0, 4, torch.zeros(4))
    with pytest.raises(UnfitFile, match="holds 0 of the 4 elements"):
        reader.fill([absent])


def write_to_full_disk(folder: str) -> str | None:
    """Rank 1 finds no room: its file is a device that is always full."""
    rank = torch.distributed.get_rank()
    writer = CheckpointWriter(Path(folder), rank, True)
    if rank == 1:
        real = writer._write
        writer._write = lambda save, path, heads, values: real(save, Path("/dev/full"), heads, values)  # type: ignore[method-assign]
    writer.start(manifest(3), [state_slice(slice_, start, stop, True) for slice_, start, stop in sharded(rank, 2, 0, 1)])
    return writer.finish()[1]


def test_a_failed_save_is_known_to_all_and_leaves_nothing(tmp_path: Path) -> None:
    errors = run_ranks(2, write_to_full_disk, str(tmp_path))
    assert errors[0] == errors[1]
    assert "rank 1" in str(errors[0]) and "No space left" in str(errors[0])
    assert list(tmp_path.iterdir()) == []


def refused_then_saved(folder: str) -> list[str | None]:
    """Rank 0 alone knows why it can't save; the next save works."""
    rank = torch.distributed.get_rank()
    writer = CheckpointWriter(Path(folder), rank, True)
    values = [state_slice(slice_, start, stop, True) for slice_, start, stop in sharded(rank, 2, 0, 1)]
    results = []
    for refusal in ("the disk must have room" if rank == 0 else None, None):
        writer.start(manifest(3), values, refusal)
        results.append(writer.finish()[1])
        assert (step_folder(Path(folder), 3) / COMPLETE).exists() == (results[-1] is None)
    return results


def test_a_save_that_rank_0_refuses_is_refused_on_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(2, refused_then_saved, str(tmp_path)) == [["rank 0: the disk must have room", None]] * 2


def save_over_a_mount(folder: str) -> str | None:
    """The folder of the save becomes a mount point, which the kernel does not rename."""
    writer = CheckpointWriter(Path(folder), 0, True)
    writer.start(manifest(3), [state_slice(slice_, start, stop, True) for slice_, start, stop in sharded(0, 1, 0, 1)])
    writer.wait()
    partial = str(step_folder(Path(folder), 3).with_suffix(".partial"))
    subprocess.run(["mount", "--bind", partial, partial], check=True)
    try:
        return writer.finish()[1]
    finally:
        subprocess.run(["umount", "--lazy", partial], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_checkpoint_stays_when_its_replacement_can_not_take_its_name(tmp_path: Path) -> None:
    run_ranks(1, save, str(tmp_path), 0, 1, True)
    before = read_manifest(step_folder(tmp_path, 3))
    (error,) = run_ranks(1, save_over_a_mount, str(tmp_path))
    assert error and "rank 0" in error and "busy" in error
    assert complete_checkpoints(tmp_path) == [(3, step_folder(tmp_path, 3))] and read_manifest(step_folder(tmp_path, 3)) == before
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000003"]


def test_newest_first_retention_and_leftovers(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        run_ranks(1, save, str(tmp_path), 0, 1, False, step)
    (tmp_path / "step_0000060.partial").mkdir()
    step_folder(tmp_path, 50).rename(tmp_path / "step_0000050.replaced")
    remove_leftovers(tmp_path)
    assert [step for step, _ in complete_checkpoints(tmp_path)] == [50, 40, 30, 20, 10], "a replaced one without heir comes back"
    gone = list(prune(tmp_path, keep=2, milestone_interval=20))
    assert [folder.name for folder in gone] == ["step_0000030", "step_0000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000020", "step_0000040", "step_0000050"]
    assert list(prune(tmp_path, keep=0, milestone_interval=None)) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run_ranks(2, save, str(tmp_path), 0, 1, True)
    run_ranks(4, save, str(tmp_path), 1, 2, True)
    assert sorted(read_manifest(step_folder(tmp_path, 3)).files) == [f"rank_0000{rank}.safetensors" for rank in range(4)]
    assert len(list(tmp_path.iterdir())) == 1


def test_another_model_or_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    problems = check_identity(manifest(1), tmp_path, {"num_layers": 3}, {"sha256": "b"})
    assert [problem.path for problem in problems] == ["model.num_layers", "data.tokenizer.path"]
    assert "must be 2" in problems[0].rule
    assert check_identity(manifest(1), tmp_path, {"num_layers": 2}, {"sha256": "a"}) == []
