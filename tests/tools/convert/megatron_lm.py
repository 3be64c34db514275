"""A Megatron-LM training run's checkpoint, made by megatron-core's own modules and its own dist_checkpointing.save.

The names and defaults of `args` are those that Megatron-LM's argument parser gives (megatron/training/arguments.py).
"""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from parallel.groups import make_groups
from parallel.layout import Layout
from parallel.runtime import start

PADDED, LENGTH = 96, 24

DENSE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 40, "ffn_hidden_size": 72, "num_attention_heads": 4, "group_query_attention": True,
    "num_query_groups": 2, "kv_channels": 12, "swiglu": True, "add_bias_linear": False, "add_qkv_bias": True,
    "normalization": "RMSNorm", "norm_epsilon": 3e-5, "qk_layernorm": True, "position_embedding_type": "rope",
    "rotary_base": 30000, "rotary_percent": 0.5, "untie_embeddings_and_output_weights": True, "vocab_size": 90,
    "padded_vocab_size": PADDED, "max_position_embeddings": 128, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "init_method_std": 0.02, "params_dtype": torch.float32, "iteration": 7, "num_experts": None,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1,
}  # fmt: skip
MOE: dict[str, Any] = {
    **DENSE, "num_experts": 4, "moe_ffn_hidden_size": 28, "moe_router_topk": 2, "moe_layer_freq": 1,
    "moe_router_score_function": "softmax", "moe_router_pre_softmax": False, "moe_shared_expert_intermediate_size": 44,
    "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01, "moe_router_dtype": "fp32",
}  # fmt: skip
MIXED: dict[str, Any] = {
    **MOE, "num_layers": 3, "moe_layer_freq": [0, 1, 1], "moe_router_score_function": "sigmoid", "qk_layernorm": False,
    "moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 1.7, "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": False,
}  # fmt: skip
KINDS = {"dense": DENSE, "moe": MOE, "mixed": MIXED}


def build(args: dict[str, Any], groups: Any, pre: bool = True, post: bool = True) -> Any:
    """Megatron-Core's GPTModel as Megatron-LM builds it with --transformer-impl local."""
    from megatron.core.models.gpt import gpt_layer_specs as specs  # noqa: PLC0415  (after parallel: CPU rewriting)
    from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: PLC0415
    from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: PLC0415

    tensor, stages, experts = (args[f"{axis}_model_parallel_size"] for axis in ("tensor", "pipeline", "expert"))
    config = TransformerConfig(
        num_layers=args["num_layers"], hidden_size=args["hidden_size"], ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=args["num_attention_heads"], num_query_groups=args["num_query_groups"],
        kv_channels=args["kv_channels"], gated_linear_unit=args["swiglu"], activation_func=torch.nn.functional.silu,
        add_bias_linear=args["add_bias_linear"], add_qkv_bias=args["add_qkv_bias"], normalization=args["normalization"],
        layernorm_epsilon=args["norm_epsilon"], qk_layernorm=args["qk_layernorm"], hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=stages, expert_model_parallel_size=experts,
        pipeline_dtype=torch.float32, num_moe_experts=args["num_experts"],
        **{name: args[name] for name in args if name.startswith("moe_")},
        masked_softmax_fusion=False, bias_dropout_fusion=False, bias_activation_fusion=False, use_cpu_initialization=True,
        persist_layer_norm=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    if args["num_experts"]:
        spec: Any = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    else:
        spec = specs.get_gpt_layer_local_spec(qk_layernorm=args["qk_layernorm"], normalization="RMSNorm")
    return GPTModel(
        config, spec, vocab_size=args["padded_vocab_size"], max_sequence_length=args["max_position_embeddings"],
        pre_process=pre, post_process=post, position_embedding_type="rope", rotary_percent=args["rotary_percent"],
        rotary_base=args["rotary_base"], share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        pg_collection=groups,
    ).eval()  # fmt: skip


def randomize(model: Any, groups: Any) -> None:
    """Weights large enough for differences to show; what is split over ranks differs between them, the rest does not."""
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if "expert_bias" in name]
    for name, tensor in [*model.named_parameters(), *buffers]:
        seed = sum(ord(letter) * (index + 1) for index, letter in enumerate(name)) + 10**6 * groups.pp.rank()
        seed += 10**7 * groups.ep.rank() if "local_experts" in name else 0
        seed += 10**8 * groups.tp.rank() if getattr(tensor, "tensor_model_parallel", False) else 0
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        tensor.data.copy_(noise * 0.3 if tensor.dim() > 1 else noise * 0.2 + (1.0 if "norm" in name else 0.0))


def is_vocab(name: str) -> bool:
    """Does a parameter of this name have a row for each token of the padded vocabulary?"""
    return "word_embeddings" in name or "output_layer" in name


def numbers_of(model: Any, groups: Any, vocab_size: int) -> NDArray[np.float32]:
    """Every number of the weights and expert biases that this rank holds, without copies of other ranks' and padded rows [n]."""
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if "expert_bias" in name]
    held = [np.empty(0, np.float32)]
    for name, tensor in [*model.named_parameters(), *buffers]:
        is_own_part = "local_experts" in name or getattr(tensor, "tensor_model_parallel", False)
        if (groups.tp.rank() and not is_own_part) or (groups.ep.rank() and "local_experts" not in name):
            continue
        rows = max(0, vocab_size - groups.tp.rank() * len(tensor)) if is_vocab(name) else len(tensor)
        held.append(tensor.detach()[:rows].numpy().ravel())
    return np.concatenate(held)


def save(folder: Path, kind: str, layout: Layout, metadata: dict[str, Any] | None = None) -> NDArray[np.float32] | None:
    """On every rank: build, fill, save under folder/iter_0000007 as Megatron-LM does; logits [b, s, vocab] on the last stage.

    Beside `folder`: numbers_RANK.npy, see numbers_of.
    """
    rank = dist.get_rank()
    start({"RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())})
    groups = make_groups(layout, 1)
    from megatron.core import dist_checkpointing  # noqa: PLC0415  (after parallel: CPU rewriting)

    degrees = {f"{axis}_model_parallel_size": getattr(layout, axis) for axis in ("tensor", "pipeline", "expert")}
    args = {**KINDS[kind], **degrees}
    model = build(args, groups, groups.pp.rank() == 0, groups.pp.rank() == layout.pipeline - 1)
    randomize(model, groups)
    np.save(folder.parent / f"numbers_{rank}.npy", numbers_of(model, groups, args["vocab_size"]))
    target = folder / "iter_0000007"
    if rank == 0:
        target.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    state = {
        "args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 7, "content_metadata": metadata,
        "model": model.sharded_state_dict(metadata=metadata),
    }  # fmt: skip
    with _children_allowed():
        dist_checkpointing.save(state, str(target))
    return forward(model, groups, args["hidden_size"])


@contextmanager
def _children_allowed() -> Iterator[None]:
    """megatron-core's writers are child processes, which daemons like our ranks may not have; they answer through a queue.

    Its own queue belongs to a manager that is spawned, which costs seconds, and outlives a rank that ends without cleaning up.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: PLC0415  (after parallel)

    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    config["daemon"] = False
    manager = multiprocessing.get_context("fork").Manager()
    filesystem_async._results_queue = manager.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = None
        manager.shutdown()
        config["daemon"] = True


def tokens_of(vocab: int = 90) -> torch.Tensor:
    """Tokens [b, s] that both sides read."""
    return torch.randint(0, vocab, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def forward(model: Any, groups: Any, hidden_size: int) -> NDArray[np.float32] | None:
    """Logits [b, s, padded vocab] on the ranks of the last stage, None on the others."""
    tokens = tokens_of()
    positions = torch.arange(LENGTH).expand_as(tokens)
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    stages = dist.get_process_group_ranks(groups.pp)
    with torch.no_grad():
        if len(stages) == 2 and groups.pp.rank() == 0:
            dist.send(model(tokens, positions, mask).contiguous(), stages[1])
            return None
        if len(stages) == 2:
            hidden = torch.empty(LENGTH, len(tokens), hidden_size)
            dist.recv(hidden, stages[0])
            model.set_input_tensor(hidden)
        local = model(tokens, positions, mask).contiguous()
    parts = [torch.empty_like(local) for _ in range(groups.tp.size())]
    dist.all_gather(parts, local, group=groups.tp)
    # As numpy: a tensor would be fetched from this rank, which may be gone by then.
    return torch.cat(parts, dim=-1).numpy()
