"""This rank's part of the model. In: config, layout, stages and groups. Out: Megatron-Core GPT chunks without values."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from configs.schema import Config
from parallel.architecture import padded_vocab
from parallel.compat.megatron_guards import yarn_on_part_of_head
from parallel.compat.private_names import require_names
from parallel.layout import Layout
from parallel.stages import Chunk
from pretrain.model.backend import Backend
from pretrain.model.routers import adapt_routers
from pretrain.model.specs import block_spec, mtp_spec

require_names(__name__)


class PaddedVocabGPT(GPTModel):
    """A GPT in which the padding of the vocabulary gets no probability, so that it changes neither loss nor gradients.

    `num_tokens_in_vocab`: the number of real tokens. `first_local_token`: the first token id of this tensor rank.
    """

    num_tokens_in_vocab: int
    first_local_token: int

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [b, s], logits [s, b, local vocabulary] -> loss of each token in nats [b, s]. Writes into `logits`."""
        real = min(max(self.num_tokens_in_vocab - self.first_local_token, 0), logits.shape[-1])
        if real < logits.shape[-1]:
            logits[..., real:] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)


def build_chunks(
    config: Config,
    vocab_size: int,
    transformer: TransformerConfig,
    layout: Layout,
    chunks: tuple[Chunk, ...],
    groups: ProcessGroupCollection,
    backend: Backend,
) -> list[PaddedVocabGPT]:
    """The chunks of this rank's stage, in the order of the interleaved schedule. Their weights have no values yet."""
    stage = groups.pp.rank()
    mine = sorted((chunk for chunk in chunks if chunk.stage == stage), key=lambda chunk: chunk.chunk)
    return [build_chunk(config, vocab_size, transformer, layout, chunk, groups, backend) for chunk in mine]


def build_chunk(
    config: Config,
    vocab_size: int,
    transformer: TransformerConfig,
    layout: Layout,
    chunk: Chunk,
    groups: ProcessGroupCollection,
    backend: Backend,
) -> PaddedVocabGPT:
    """One chunk. `vocab_size`: the number of real tokens. The embedding is padded to a size that no layout changes."""
    model, position, scaling = config.model, config.model.position, config.model.position.scaling
    vp_stage = chunk.chunk if layout.virtual_pipeline > 1 else None
    padded = padded_vocab(model, vocab_size)
    gpt = PaddedVocabGPT(
        config=transformer,
        transformer_layer_spec=block_spec(transformer, chunk, backend),  # type: ignore[arg-type]
        vocab_size=padded,
        max_sequence_length=model.max_position_tokens or config.batch.seq_length_tokens,
        pre_process=chunk.embedding,
        post_process=chunk.head,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type=_position_kind(config),
        rotary_percent=position.rotary_fraction,
        rotary_base=position.theta,  # type: ignore[arg-type]
        rope_scaling=scaling.kind == "llama3",
        rope_scaling_factor=scaling.factor,
        seq_len_interpolation_factor=scaling.factor if scaling.kind == "linear" else None,
        mtp_block_spec=mtp_spec(transformer, backend, vp_stage) if chunk.mtp else None,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if _position_kind(config) == "yarn" and position.rotary_fraction < 1.0:
        gpt.rotary_pos_emb = yarn_on_part_of_head(gpt.rotary_pos_emb, position.rotary_fraction, transformer)
    adapt_routers(gpt, model.moe.router)
    gpt.num_tokens_in_vocab = vocab_size
    gpt.first_local_token = groups.tp.rank() * (padded // groups.tp.size())
    return gpt


def _position_kind(config: Config) -> Any:
    position = config.model.position
    if position.kind == "rope" and position.scaling.kind == "yarn" and config.model.mla.kv_lora_rank is None:
        return "yarn"
    return {"rope": "rope", "learned": "learned_absolute", "none": "none"}[position.kind]
