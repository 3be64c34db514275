"""This rank's part of the model. In: config, layout, stages and groups. Out: Megatron-Core GPT chunks without values."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from configs.model_schema import Position, RopeScaling
from configs.schema import Config
from parallel.architecture import padded_vocab
from parallel.compat.megatron_guards import yarn_on_part_of_head
from parallel.compat.private_names import require_names
from parallel.layout import Layout
from parallel.stages import Chunk
from pretrain.model.attention import window_of
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
        seq_len_interpolation_factor=scaling.factor if scaling.kind == "linear" else None,
        mtp_block_spec=mtp_spec(transformer, backend, vp_stage) if chunk.mtp else None,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if _position_kind(config) == "yarn" and position.rotary_fraction < 1.0:
        gpt.rotary_pos_emb = yarn_on_part_of_head(gpt.rotary_pos_emb, position.rotary_fraction, transformer)
    if scaling.kind == "llama3":
        gpt.rotary_pos_emb.inv_freq = llama3_frequencies(gpt.rotary_pos_emb.inv_freq, scaling)
    if scaling.kind != "none" and scaling.layers == "full_attention":
        unscale_windows(gpt, position, groups)
    adapt_routers(gpt, model.moe.router)
    gpt.num_tokens_in_vocab = vocab_size
    gpt.first_local_token = groups.tp.rank() * (padded // groups.tp.size())
    return gpt


def llama3_frequencies(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3's scaling of rotary frequencies, in radians a token. Megatron-Core fixes three of its four numbers.

    A frequency that turns more than high_freq_factor times over the original context is kept, one that turns less than
    low_freq_factor times is divided by the factor, and those between are blended. Source: transformers' modeling_rope_utils.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * plain / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0) if high > low else (turns >= low).to(plain.dtype)
    return (1.0 - share) * plain / scaling.factor + share * plain


def unscale_windows(gpt: PaddedVocabGPT, position: Position, groups: ProcessGroupCollection) -> None:
    """Give the layers with a window rotary frequencies without scaling (OLMo-3). Megatron-Core has one table for all layers."""
    config = gpt.config
    table = RotaryEmbedding(
        config.kv_channels or 0,
        position.rotary_fraction,
        rotary_interleaved=position.interleaved,
        rotary_base=position.theta,  # type: ignore[arg-type]
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=groups.cp,
    )

    def unscaled(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"rotary_pos_emb": table(len(kwargs["rotary_pos_emb"]) * groups.cp.size())}

    plain = copy.copy(config)
    for name in [name for name in vars(plain) if name.startswith("yarn_")]:
        # With them the attention scales cosines and sines by YaRN's temperature.
        delattr(plain, name)
    layers: Any = gpt.decoder.layers
    for layer in layers:
        if window_of(config, layer.layer_number):
            layer.self_attention.config = plain
            # Megatron-Core 0.19 has read the temperature from the first configuration when the layer was made.
            layer.self_attention._yarn_concentration_factor = 1.0
            layer.self_attention.register_forward_pre_hook(unscaled, with_kwargs=True)


def _position_kind(config: Config) -> Any:
    position = config.model.position
    if position.kind == "rope" and position.scaling.kind == "yarn" and config.model.mla.kv_lora_rank is None:
        return "yarn"
    return {"rope": "rope", "learned": "learned_absolute", "none": "none"}[position.kind]
