"""Rules of DeepSeek sparse attention, which is counted and planned, and not trained.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import Problem
from configs.model_schema import Model
from configs.schema import Config
from parallel import architecture as arch
from parallel.legality.rules import reads

# docs/sparse-attention.md has the long form.
NO_INDEXER = (
    "megatron-core 0.16.1 runs the indexer of sparse attention in bf16 on GPUs only, where no rehearsal could hold it, and does "
    "not divide its loss by the number of micro-batches"
)


def why_only_planned(model: Model) -> str:
    """Why a model can be counted and planned but not trained. Empty: it can be trained."""
    return model.planning_only or (NO_INDEXER if arch.is_sparse(model) else "")


@reads("model.planning_only", "model.dsa")
def can_be_built(config: Config) -> Iterator[Problem]:
    """The model can be trained: it is not for planning only."""
    model = config.model
    if model.planning_only:
        rule = f"this preset is for counting and planning only: {model.planning_only}"
        yield Problem("model.planning_only", model.name, rule, "train another preset")
    elif arch.is_sparse(model):
        fix = "train with model.dsa.top_k=null, every key, as DeepSeek-V3.2 and GLM-5 were pretrained; or use phalanx plan"
        rule = f"sparse attention is for counting and planning only: {NO_INDEXER}"
        yield Problem("model.dsa.top_k", model.dsa.top_k, rule, fix)


@reads("model.dsa", "model.mla", "model.attention")
def sparse_attention_fits(config: Config) -> Iterator[Problem]:
    """Sparse attention chooses among the keys of latent attention, without a window, and its heads hold the rotated width."""
    model = config.model
    if not arch.is_sparse(model):
        return
    if not arch.is_mla(model):
        rule = "must be set with sparse attention (model.dsa.top_k): an indexer chooses among compressed keys"
        yield Problem("model.mla.kv_lora_rank", None, rule, "set model.mla.kv_lora_rank, or model.dsa.top_k=null")
    if model.attention.window_size_tokens is not None:
        rule = "must be null with sparse attention (model.dsa.top_k), which chooses among all keys"
        fix = "set model.attention.window_size_tokens=null, or model.dsa.top_k=null"
        yield Problem("model.attention.window_size_tokens", model.attention.window_size_tokens, rule, fix)
    rotated = model.mla.qk_rope_head_dim
    if model.dsa.index_head_dim < rotated:
        rule = f"must be at least model.mla.qk_rope_head_dim = {rotated}, which is the rotated part of an indexer's head"
        yield Problem(
            "model.dsa.index_head_dim", model.dsa.index_head_dim, rule, f"set model.dsa.index_head_dim={rotated} or more"
        )


RULES = (can_be_built, sparse_attention_fits)
