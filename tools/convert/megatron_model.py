"""A checkpoint as a Megatron-Core model in this process, on the CPU, in fp32: for verify, generate and evaluate.

In: a checkpoint's folder and Model. Out: a GPT model that maps tokens [b, s] to logits [b, s, vocab].
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.errors import ConfigError
from configs.model_schema import Model
from configs.schema import Batch, Config, Precision
from parallel import architecture as arch
from parallel.groups import close_groups, make_groups
from parallel.layout import make_layout
from parallel.runtime import start, stop
from parallel.stages import make_chunks
from pretrain.checkpoint.read import CheckpointReader
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.engine.base import WEIGHT, StateSlice
from pretrain.model.backend import choose_backend, detect_machine
from pretrain.model.gpt import PaddedVocabGPT, build_chunks
from pretrain.model.megatron_config import make_transformer_config
from pretrain.model.shards import local_tensors, map_shards
from tools.convert.checkpoints import damage

if TYPE_CHECKING:
    # At run time `parallel` must be imported before megatron (parallel/compat/megatron_cpu.py).
    from megatron.core.process_groups_config import ProcessGroupCollection


def inference_config(model: Model, seq_length_tokens: int, layers: int | None = None, with_depths: bool = False) -> Config:
    """The config of a model for inference: one rank, fp32, no dropout, the first `layers` layers, MTP `with_depths` only."""
    model = copy.deepcopy(model)
    if not with_depths:
        model.mtp.num_layers = 0
    model.hidden_dropout = model.attention.dropout = 0.0
    # Megatron-Core applies jitter in evaluation, too.
    model.moe.router.jitter_eps = 0.0
    # Token dropping and token exchange between ranks are for training only.
    model.moe.capacity_factor, model.moe.pad_to_capacity, model.moe.shared_overlap = None, False, False
    model.moe.dispatcher, model.moe.grouped_gemm = "alltoall", "off"
    if layers is not None and layers < model.num_layers:
        if model.moe.num_experts:
            model.moe.layer_pattern = [int(flag) for flag in arch.moe_layers(model)[:layers]]
        if model.attention.window_pattern is not None:
            model.attention.window_pattern = model.attention.window_pattern[:layers]
        if model.position.layer_pattern is not None:
            model.position.layer_pattern = model.position.layer_pattern[:layers]
        model.num_layers = layers
        if not any(arch.moe_layers(model)):
            model.moe.num_experts, model.moe.layer_pattern = 0, None
    # Inference may use more positions than training did.
    model.max_position_tokens = max(model.max_position_tokens or 0, seq_length_tokens)
    return Config(
        model=model, precision=Precision(params="fp32"), batch=Batch(seq_length_tokens=seq_length_tokens, global_batch_seqs=1)
    )


@contextmanager
def loaded_model(
    folder: Path, model: Model, seq_length_tokens: int, layers: int | None = None, with_depths: bool = False
) -> Iterator[PaddedVocabGPT]:
    """The model with the checkpoint's weights, until the context ends.

    Raises ConfigError when the checkpoint is damaged. A process can hold one such model at a time.
    """
    with _built(inference_config(model, seq_length_tokens, layers, with_depths)) as (chunk, groups):
        try:
            CheckpointReader(folder).fill(weight_slices(chunk, groups))
        except DamagedFile as error:
            raise ConfigError(damage(folder, error)) from error
        yield chunk.eval()


@contextmanager
def _built(config: Config) -> Iterator[tuple[PaddedVocabGPT, ProcessGroupCollection]]:
    """The model without its weights, in a process group of one rank that ends with the context."""
    start({})
    vocab_size = config.model.vocab_size
    assert vocab_size, "a checkpoint's model states its vocabulary"
    layout = make_layout(config)
    chunks = make_chunks(config.model, 1, 1, vocab_size)
    try:
        groups = make_groups(layout, config.run.seed)
        backend = choose_backend(config, detect_machine(cuda=False))
        transformer = make_transformer_config(config, layout, chunks, backend)
        (chunk,) = build_chunks(config, vocab_size, transformer, layout, chunks, groups, backend)
        yield chunk, groups
    finally:
        close_groups()
        stop()


def meta_parameters(model: Model) -> dict[str, tuple[int, ...]]:
    """Canonical name -> global shape of every parameter that Megatron-Core builds. No memory is allocated."""
    with torch.device("meta"), _built(inference_config(model, 32)) as (chunk, groups):
        names = dict(chunk.named_parameters())
        return {shard.name: shard.global_shape for name, shard in map_shards(chunk, groups).items() if name in names}


def weight_slices(chunk: PaddedVocabGPT, groups: ProcessGroupCollection) -> Iterator[StateSlice]:
    """Every tensor of the model as state slices that a reader fills in place."""
    shards = map_shards(chunk, groups)
    with torch.no_grad():
        for name, tensor in local_tensors(chunk):
            shard, flat = shards[name], tensor.detach().view(-1)
            for at, slice_, start, stop_at in shard.slice_ranges(0, flat.numel()):
                yield StateSlice(WEIGHT, shard.name, shard.global_shape, slice_, start, stop_at, flat[at : at + stop_at - start])


def logits_of(chunk: PaddedVocabGPT, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [b, s] -> logits [b, s, vocab] in fp32, without the padding of the vocabulary."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = chunk(tokens, positions, None)
    return logits.float()[..., : chunk.num_tokens_in_vocab]


def depth_logits_of(chunk: PaddedVocabGPT, tokens: torch.Tensor) -> list[torch.Tensor]:
    """tokens [b, s] -> logits of the model [b, s, vocab], then of each prediction depth k [b, s - k, vocab], in fp32.

    Megatron-Core computes the depths within the loss only: their hidden states are taken on the way there.
    """
    hidden: list[Any] = []
    hook = chunk.mtp.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    try:
        with torch.no_grad():
            chunk(tokens, positions, None, labels=tokens)
            # [(1 + depths) * s, b, h]: the model's own hidden states come first.
            parts = hidden[0].chunk(1 + len(chunk.mtp.layers), dim=0)
            weight = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
            logits = [chunk.output_layer(part, weight=weight)[0].transpose(0, 1) for part in parts]
    finally:
        hook.remove()
    length, vocab = tokens.shape[1], chunk.num_tokens_in_vocab
    return [part.float()[:, : length - depth, :vocab] for depth, part in enumerate(logits)]
