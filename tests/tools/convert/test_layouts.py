"""Imported weights on 4 ranks at tp2·pp2·ep2 give transformers' logits, and the trained checkpoint goes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.schema import Config
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_model
from pretrain.checkpoint.read import CheckpointReader
from tests.ranks import run_ranks
from tests.tools.convert.test_families import run_import
from tests.tools.convert.tiny import MODELS, RARE, make
from tools.convert.checkpoints import model_of, open_manifest
from tools.convert.megatron_model import inference_config, weight_slices
from tools.convert.transformers_model import transformers_logits

LENGTH = 24


def parallel_logits(folder: Path) -> NDArray[np.float32] | None:
    """Logits [b, s, vocab] on the ranks of the last stage, None on the others."""
    model = model_of(open_manifest(folder))
    config: Config = inference_config(model, LENGTH)
    config.parallel.tensor = config.parallel.pipeline = config.parallel.expert = 2
    config.launch.processes_per_node = 4
    if not model.moe.num_experts:
        config.parallel.expert = 1
    start({"RANK": str(dist.get_rank()), "WORLD_SIZE": "4"})
    layout = make_layout(config)
    vocab = config.model.vocab_size or 0
    chunks = make_chunks(config.model, layout.pipeline, 1, vocab)
    groups = make_groups(layout, config.run.seed)
    (chunk,) = make_model(config, vocab, layout, chunks, groups, torch.device("cpu"))
    CheckpointReader(folder).fill(weight_slices(chunk, groups))
    chunk.eval()
    tokens = fixed_tokens(vocab)
    positions = torch.arange(LENGTH).expand_as(tokens)
    hidden = torch.empty(LENGTH // 2, len(tokens), config.model.hidden_size)
    stages = dist.get_process_group_ranks(groups.pp)
    with torch.no_grad():
        if groups.pp.rank() == 0:
            dist.send(chunk(tokens, positions, None).contiguous(), stages[1])
            return None
        dist.recv(hidden, stages[0])
        chunk.set_input_tensor(hidden)
        local = chunk(tokens, positions, None).contiguous()
    parts = [torch.empty_like(local) for _ in range(2)]
    dist.all_gather(parts, local, group=groups.tp)
    # As numpy: a tensor would be fetched from this rank, which may be gone by then.
    return torch.cat(parts, dim=-1)[..., :vocab].numpy()


def fixed_tokens(vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.prove if name in RARE else ())
        for name in MODELS
        if name not in ("llama_linear", "qwen3_yarn", "kimi", "mistral")
    ],
)
def test_logits_on_four_ranks(name: str, tmp_path: Path) -> None:
    # Heads and groups that two tensor ranks can share, layers that two stages can.
    more: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4} if name == "qwen2_moe" else {}
    more |= {"num_hidden_layers": 2, "mlp_only_layers": [0]} if name == "qwen3_moe" else {}
    more |= {"num_hidden_layers": 2, "mlp_layer_types": ["sparse", "dense"]} if name == "glm4_moe_lite" else {}
    made = make(name, tmp_path / "hf", **more)
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    found = [logits for logits in run_ranks(4, parallel_logits, tmp_path / "checkpoint") if logits is not None]
    expected = transformers_logits(tmp_path / "hf", {}, fixed_tokens(90), made.config.num_hidden_layers)[0]
    assert len(found) == 2
    for logits in found:
        assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4
