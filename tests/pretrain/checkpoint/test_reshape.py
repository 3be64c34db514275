"""A checkpoint of any layout and engine goes on under any other: the gathered state bit for bit, the next loss to one ulp
where tensor, context and expert-tensor degrees stay, else to rehearsal tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from configs.schema import Config
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_engine, make_model
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.read import CheckpointReader
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.run.folder import step_folder
from tests.pretrain.world import VOCAB, assemble, batches_of, small_config
from tests.ranks import run_ranks

# The model has everything that a state may hold: biased selection, a dense layer, tied embeddings.
MODEL: dict[str, Any] = {
    "model__moe__router__score": "sigmoid", "model__moe__router__expert_bias": True, "model__moe__first_dense_layers": 1,
    "model__tie_embeddings": True,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "pp2·ep2": (4, {"parallel__pipeline": 2, "parallel__expert": 2}),
    "dp4": (4, {"zero__stage": 0}),
    "tp2·etp2": (2, {"parallel__tensor": 2, "parallel__expert_tensor": 2}),
    "deepspeed 1": (2, {"parallel__expert": 2, "zero__engine": "deepspeed", "zero__stage": 1}),
    "deepspeed 2·pp2": (2, {"parallel__pipeline": 2, "zero__engine": "deepspeed", "zero__stage": 2}),
    "deepspeed 3": (2, {"parallel__expert": 2, "zero__engine": "deepspeed", "zero__stage": 3}),
}
PAIRS = [
    ("pp2·ep2", "one"), ("one", "deepspeed 3"), ("deepspeed 3", "dp4"), ("tp2·etp2", "deepspeed 2·pp2"),
    ("one", "pp2·ep2"), ("deepspeed 1", "tp2·etp2"), ("deepspeed 2·pp2", "deepspeed 1"),
]  # fmt: skip

State = dict[Any, np.ndarray]


def config_of(name: str, kind: str = "adamw") -> Config:
    world, layout = LAYOUTS[name]
    muon = {"optimizer__muon__ns_dtype": "fp32", "optimizer__muon__router": "muon"}
    return small_config(launch__processes_per_node=world, optimizer__kind=kind, **muon, **MODEL, **layout)


def go_on(config: Config, load: str | None, save: str | None, steps: int) -> tuple[State, float]:
    """On a forked rank: load, or begin; train; save. (this rank's slices after loading or training, loss of the next step)."""
    layout = make_layout(config)
    runtime = start({"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())})
    chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, VOCAB, None)
    groups = make_groups(layout, config.run.seed)
    model = make_model(config, VOCAB, layout, chunks, groups, runtime.device)
    engine = make_engine(config, model, groups, runtime.device)
    if load:
        reader = CheckpointReader(step_folder(Path(load), 2))
        reader.fill(engine.local_state(True))
        engine.loaded(reader.manifest.optimizer_steps)
    for step in range(steps):
        engine.step(batches_of(config, step, groups.dp.rank(), groups.dp.size()), 3e-3)
    state_slices = list(engine.owned_state())
    if save:
        manifest = Manifest(
            1, 2, 0, 0, engine.optimizer_steps(), None, engine.name, engine.zero_stage, {}, {}, VOCAB, None, None, {},
            ("weight", "exp_avg", "exp_avg_sq", "momentum"), {}, {}, dist.get_world_size(),
        )  # fmt: skip
        writer = CheckpointWriter(Path(save), dist.get_rank(), True)
        writer.start(manifest, state_slices)
        assert writer.finish()[1] is None
    state = {
        (p.kind, p.name, p.global_shape, p.tensor_slice, p.start, p.stop): p.data.detach().clone().numpy() for p in state_slices
    }
    result = engine.step(batches_of(config, 2, groups.dp.rank(), groups.dp.size()), 3e-3)
    return state, result.loss


MUON_PAIRS = [("tp2·etp2", "deepspeed 3"), ("deepspeed 2·pp2", "dp4"), ("pp2·ep2", "pp2·ep2"), ("deepspeed 1", "tp2·etp2")]
CASES = [
    *((*pair, "adamw") for pair in PAIRS[:4]), *(pytest.param(*pair, "adamw", marks=pytest.mark.prove) for pair in PAIRS[4:]),
    (*MUON_PAIRS[0], "muon"), *(pytest.param(*pair, "muon", marks=pytest.mark.prove) for pair in MUON_PAIRS[1:]),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "kind"), CASES)
def test_any_state_goes_on_under_any_layout_and_engine(before: str, after: str, kind: str, tmp_path: Path) -> None:
    wrote = run_ranks(LAYOUTS[before][0], go_on, config_of(before, kind), None, str(tmp_path), 2)
    read = run_ranks(LAYOUTS[after][0], go_on, config_of(after, kind), str(tmp_path), None, 0)
    old, new = assemble([state for state, _ in wrote]), assemble([state for state, _ in read])
    assert {kind for kind, _ in old} >= {"weight", "exp_avg"} | ({"momentum"} if kind == "muon" else set())
    assert old.keys() == new.keys()
    assert any(name.endswith("expert_bias") for _, name in old)
    for key in old:
        assert np.array_equal(old[key], new[key]), key
    loss, next_loss = wrote[0][1], read[0][1]
    same_products = "tp2·etp2" not in (before, after)
    tolerance = float(np.spacing(np.float32(loss))) if same_products else 1e-5 * loss
    assert abs(next_loss - loss) <= (0 if before == after else tolerance)
