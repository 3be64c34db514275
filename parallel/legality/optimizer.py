"""Rules of the optimizer. Config in, problems out.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import Problem
from configs.optimizer_schema import Muon
from configs.schema import Config
from parallel import architecture as arch
from parallel.legality.rules import reads


@reads("optimizer.kind", "zero")
def muon_keeps_state_in_memory(config: Config) -> Iterator[Problem]:
    """Muon's momentum is in memory, on the device or on the host: never on NVMe."""
    zero = config.zero
    if config.optimizer.kind == "muon" and zero.offload != "none" and zero.offload_device == "nvme":
        rule = "DeepSpeed reads state from NVMe for AdamW's update only, a sub-group at a time; Muon needs whole matrices"
        yield Problem("zero.offload_device", "nvme", rule, "set zero.offload_device=cpu, or optimizer.kind=adamw")


@reads("optimizer", "model.attention", "model.mla", "model.delta_net", "model.mtp")
def qk_clip_has_an_effect(config: Config) -> Iterator[Problem]:
    """QK-clip belongs to Muon, and scales projections whose scale reaches the logits."""
    muon, attention, mla = config.optimizer.muon, config.model.attention, arch.is_mla(config.model)
    path = "optimizer.muon.qk_clip"
    if muon.qk_clip is None:
        if muon.qk_clip_alpha != Muon().qk_clip_alpha:
            rule = "has no effect while optimizer.muon.qk_clip is null"
            yield Problem(f"{path}_alpha", muon.qk_clip_alpha, rule, "set optimizer.muon.qk_clip, or leave it out")
        return
    if config.optimizer.kind != "muon":
        yield Problem(
            path, muon.qk_clip, f"is Muon's: optimizer.kind = {config.optimizer.kind}", "set it to null, or optimizer.kind=muon"
        )
    if attention.qk_norm and not mla:
        rule = "has no effect with norms of queries and keys (model.attention.qk_norm): they undo every scale"
        yield Problem(path, muon.qk_clip, rule, "set optimizer.muon.qk_clip=null; the norms bound the logits")
    elif attention.qk_l2_norm and not mla:
        rule = (
            "would shrink rotated layers' weights at every step without an effect: model.attention.qk_l2_norm undoes every scale "
            "there; layers without positions alone are never clipped"
        )
        yield Problem(path, muon.qk_clip, rule, "set optimizer.muon.qk_clip=null")
    elif all(arch.delta_layers(config.model)) and not config.model.mtp.num_layers:
        rule = "has no effect: every layer is a gated delta net (model.delta_net.pattern), which has no attention logits"
        yield Problem(path, muon.qk_clip, rule, "set optimizer.muon.qk_clip=null")
    elif not mla and arch.num_query_groups(config.model) < attention.num_heads and muon.qk_clip_alpha != Muon().qk_clip_alpha:
        rule = "has no effect with grouped keys: a key belongs to several heads, so the queries take the whole factor"
        yield Problem(f"{path}_alpha", muon.qk_clip_alpha, rule, "leave it out")


@reads("model.mup", "model.hidden_size", "model.tie_embeddings", "model.attention", "model.mla", "optimizer")
def width_transfer_has_its_conditions(config: Config) -> Iterator[Problem]:
    """muP scales an output layer of its own, needs a fixed head width, and leaves Muon's matrices to Muon's spectral scale."""
    model, base = config.model, config.model.mup.base_hidden_size
    if base is None:
        return
    if model.tie_embeddings:
        rule = "muP scales the embedding and the output layer differently, so they can't share weights"
        fix = "set model.tie_embeddings=false, or leave model.mup.base_hidden_size out"
        yield Problem("model.tie_embeddings", True, rule, fix)
    if not arch.is_mla(model) and model.attention.head_dim is None and base != model.hidden_size:
        rule = "under muP heads keep their width and grow in number: the scale of the scores is 1 / sqrt(head_dim) at every width"
        fix = f"state model.attention.head_dim, such as {arch.head_dim(model)}"
        yield Problem("model.attention.head_dim", None, rule, fix)
    muon = config.optimizer
    if muon.kind == "muon" and muon.muon.scale != "spectral":
        rule = "Muon's update grows as muP needs it with the scale spectral only; match_rms is that of AdamW's standard updates"
        yield Problem("optimizer.muon.scale", muon.muon.scale, rule, "set optimizer.muon.scale=spectral")


RULES = (muon_keeps_state_in_memory, qk_clip_has_an_effect, width_transfer_has_its_conditions)
