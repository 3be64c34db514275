"""This rank's part of the model: Megatron-Core GPT chunks, built from config, layout and groups."""

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
from pretrain.model.specs import block_spec, mtp_spec

require_names(__name__)


class PaddedVocabGPT(GPTModel):
    """A GPT whose padded vocabulary entries never receive probability, so that padding changes no number."""

    num_tokens_in_vocab: int
    first_local_token: int

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [b, s], logits [s, b, local vocab] -> loss of each token [b, s]."""
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
    """The chunks of this rank's stage, in the order of the interleaved schedule; weights are not filled yet."""
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
    """One chunk. `vocab_size` is the number of real tokens; the table is padded independently of the layout."""
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
    gpt.num_tokens_in_vocab = vocab_size
    gpt.first_local_token = groups.tp.rank() * (padded // groups.tp.size())
    return gpt


def _position_kind(config: Config) -> Any:
    position = config.model.position
    if position.kind == "rope" and position.scaling.kind == "yarn" and config.model.mla.kv_lora_rank is None:
        return "yarn"
    return {"rope": "rope", "learned": "learned_absolute", "none": "none"}[position.kind]
