"""Rules of gated delta nets, gated attention and zero-centred norms (Qwen3-Next).

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import Problem
from configs.schema import Config
from parallel import architecture as arch
from parallel.legality.rules import near_divisors, near_multiples, reads


@reads("model.delta_net", "model.num_layers", "model.mla")
def delta_net_pattern(config: Config) -> Iterator[Problem]:
    """The pattern of gated delta nets names layers of the model, and excludes latent attention."""
    pattern, layers = config.model.delta_net.pattern, config.model.num_layers
    path = "model.delta_net.pattern"
    if pattern is None:
        return
    if not 0 < len(pattern) <= layers:
        rule = f"must name at least 1 and at most all of the model.num_layers = {layers} layers, not {len(pattern)}"
        yield Problem(path, pattern, rule, "give numbers, 0 attention and 1 gated delta net; a shorter list repeats")
    if arch.has_delta_net(config.model) and arch.is_mla(config.model):
        rule = "must be null with latent attention (model.mla.kv_lora_rank): no model has both, and none was held against one"
        yield Problem(path, pattern, rule, f"set {path}=null, or model.mla.kv_lora_rank=null")


@reads("model.delta_net", "parallel.tensor", "parallel.context")
def delta_net_heads(config: Config) -> Iterator[Problem]:
    """Key heads divide the value heads, and the tensor degree times the context degree divides the key heads."""
    net, tensor, context = config.model.delta_net, config.parallel.tensor, config.parallel.context
    if not arch.has_delta_net(config.model):
        return
    if net.num_value_heads % net.num_key_heads:
        rule = f"must be a multiple of model.delta_net.num_key_heads = {net.num_key_heads}"
        fix = f"set it to {near_multiples(net.num_value_heads, net.num_key_heads)}"
        yield Problem("model.delta_net.num_value_heads", net.num_value_heads, rule, fix)
    if net.num_key_heads % tensor:
        rule = f"must divide model.delta_net.num_key_heads = {net.num_key_heads}"
        yield Problem("parallel.tensor", tensor, rule, f"set parallel.tensor to {near_divisors(net.num_key_heads, tensor)}")
    elif net.num_key_heads // tensor % context:
        local = net.num_key_heads // tensor
        rule = f"must divide model.delta_net.num_key_heads / parallel.tensor = {local}: context ranks share a rank's key heads"
        yield Problem("parallel.context", context, rule, f"set parallel.context to {near_divisors(local, context)}")


@reads("model.delta_net", "data.document_mask")
def delta_net_has_no_documents(config: Config) -> Iterator[Problem]:
    """A gated delta net excludes document masks: its state goes from each token to the next."""
    if arch.has_delta_net(config.model) and config.data.document_mask:
        why = "the state of a gated delta net (model.delta_net.pattern) goes from each token to the next"
        rule = f"must be off: {why}, across the border of documents too"
        yield Problem("data.document_mask", True, rule, "set data.document_mask=false")


@reads("model.delta_net", "model.mup")
def delta_net_has_no_width_transfer(config: Config) -> Iterator[Problem]:
    """muP excludes gated delta nets: their activations were never held to be the same at every width."""
    base = config.model.mup.base_hidden_size
    if base is not None and arch.has_delta_net(config.model):
        rule = "must be null with gated delta nets (model.delta_net.pattern): no rule of muP is known to hold for their states"
        yield Problem("model.mup.base_hidden_size", base, rule, "set model.mup.base_hidden_size=null")


@reads("model.norm", "model.attention")
def zero_centered_norms(config: Config) -> Iterator[Problem]:
    """Zero-centred norms of queries and keys span one head and come before the rotation."""
    attention = config.model.attention
    if config.model.norm != "zero_centered_rmsnorm" or not attention.qk_norm:
        return
    for name, got, wanted in (("qk_norm_span", attention.qk_norm_span, "head"),
                              ("qk_norm_after_rotation", attention.qk_norm_after_rotation, False)):  # fmt: skip
        if got != wanted:
            rule = "has no zero-centred form (model.norm = zero_centered_rmsnorm)"
            yield Problem(f"model.attention.{name}", got, rule, f"set model.attention.{name}={str(wanted).lower()}")


@reads("model.attention", "model.mla", "parallel.tensor")
def output_gate_fits(config: Config) -> Iterator[Problem]:
    """The output gate of attention needs ordinary attention, and a key/value head for each tensor rank."""
    model, tensor = config.model, config.parallel.tensor
    if not model.attention.output_gate:
        return
    if arch.is_mla(model):
        rule = "must be off with latent attention: megatron-core has no output gate there"
        yield Problem("model.attention.output_gate", True, rule, "set it to false, or model.mla.kv_lora_rank=null")
    elif tensor > arch.num_query_groups(model):
        groups = arch.num_query_groups(model)
        rule = f"must be at most the {groups} key/value heads with an output gate: megatron-core divides no gate further"
        yield Problem("parallel.tensor", tensor, rule, f"set parallel.tensor={groups} or less")


RULES = (
    delta_net_pattern,
    delta_net_heads,
    delta_net_has_no_documents,
    delta_net_has_no_width_transfer,
    zero_centered_norms,
    output_gate_fits,
)
