"""Rules of `model.moe`: which experts, routers and dispatchers there are, and what fits which layout and batch.

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from configs.errors import Problem
from configs.schema import Config
from parallel import architecture as arch
from parallel.layout import sequence_parallel
from parallel.legality.rules import has_experts, near_divisors, on_gpu, reads


@reads("model.mlp_bias", "model.moe", "parallel.expert_tensor")
def expert_biases(config: Config) -> Iterator[Problem]:
    """Biases in experts exclude expert_tensor above 1 and shared experts."""
    model, degree = config.model, config.parallel.expert_tensor
    if not (model.mlp_bias and has_experts(config)):
        return
    if degree > 1:
        rule = "must be 1 with biases in the experts (model.mlp_bias): they would be added once a rank"
        yield Problem("parallel.expert_tensor", degree, rule, "set parallel.expert_tensor=1")
    if model.moe.shared_ffn_hidden_size:
        rule = "megatron-core has no biases in shared experts (model.moe.shared_ffn_hidden_size is set)"
        yield Problem("model.mlp_bias", True, rule, "set model.mlp_bias=false")


@reads("model.moe", "model.num_layers")
def pattern_fits(config: Config) -> Iterator[Problem]:
    """model.moe.layer_pattern names every layer, and a model with experts has at least one MoE layer."""
    moe, layers = config.model.moe, config.model.num_layers
    if moe.layer_pattern is not None and len(moe.layer_pattern) != layers:
        rule = f"must name each of the model.num_layers = {layers} layers, not {len(moe.layer_pattern)}"
        yield Problem("model.moe.layer_pattern", moe.layer_pattern, rule, f"give {layers} numbers, 0 dense and 1 MoE")
    elif has_experts(config) and not any(arch.moe_layers(config.model)):
        path = "model.moe.layer_pattern" if moe.layer_pattern is not None else "model.moe.first_dense_layers"
        got = moe.layer_pattern if moe.layer_pattern is not None else moe.first_dense_layers
        rule = f"leaves none of the {layers} layers to the {moe.num_experts} experts"
        yield Problem(path, got, rule, f"make a layer MoE ({path}), or set model.moe.num_experts=0")


@reads("model.moe")
def expert_keys_need_experts(config: Config) -> Iterator[Problem]:
    """Keys of experts are unset in a dense model."""
    moe = config.model.moe
    if has_experts(config):
        return
    for name in ("shared_ffn_hidden_size", "layer_pattern", "capacity_factor", "ffn_hidden_size"):
        value = getattr(moe, name)
        if value is not None and not (name == "layer_pattern" and not any(value)):
            rule = "has no effect in a dense model (model.moe.num_experts = 0)"
            yield Problem(f"model.moe.{name}", value, rule, f"set model.moe.num_experts, or {name}=null")


@reads("model.moe")
def top_k_fits(config: Config) -> Iterator[Problem]:
    """A token uses at most all experts."""
    moe = config.model.moe
    if has_experts(config) and moe.top_k > moe.num_experts:
        rule = f"must be at most model.moe.num_experts = {moe.num_experts}"
        yield Problem("model.moe.top_k", moe.top_k, rule, f"set model.moe.top_k={moe.num_experts} or less")


@reads("model.moe")
def router_groups(config: Config) -> Iterator[Problem]:
    """Group-limited routing: groups divide the experts, and the chosen groups hold at least top_k experts."""
    moe, router = config.model.moe, config.model.moe.router
    groups, chosen = router.num_groups, router.group_top_k
    if (groups is None and chosen is None) or not has_experts(config):
        return
    if groups is None or chosen is None:
        missing = "num_groups" if groups is None else "group_top_k"
        rule = "num_groups and group_top_k go together: a token uses group_top_k of num_groups groups"
        yield Problem(f"model.moe.router.{missing}", None, rule, f"set model.moe.router.{missing}, or the other to null")
        return
    if moe.num_experts % groups:
        rule = f"must divide model.moe.num_experts = {moe.num_experts}"
        yield Problem("model.moe.router.num_groups", groups, rule, f"set it to {near_divisors(moe.num_experts, groups)}")
        return
    if chosen > groups:
        rule = f"must be at most model.moe.router.num_groups = {groups}"
        yield Problem("model.moe.router.group_top_k", chosen, rule, f"set it to {groups} or less")
        return
    available = chosen * (moe.num_experts // groups)
    if not chosen <= moe.top_k <= available:
        rule = f"must be at least group_top_k = {chosen} and at most the {available} experts of the chosen groups"
        yield Problem("model.moe.top_k", moe.top_k, rule, f"set model.moe.top_k between {chosen} and {available}")
    scored, width = router.group_score_experts or 1, moe.num_experts // groups
    if scored > width:
        rule = f"must be at most the {width} experts of a group"
        yield Problem("model.moe.router.group_score_experts", scored, rule, f"set it to {width} or less")


@reads("model.moe", "model.mlp_bias", "model.activation")
def router_weights(config: Config) -> Iterator[Problem]:
    """Normalisation of the chosen experts' weights and the selection bias suit top_k and the score function."""
    moe, router = config.model.moe, config.model.moe.router
    if not has_experts(config):
        return
    path = "model.moe.router.normalize_top_k"
    if moe.top_k == 1 and router.normalize_top_k:
        rule = "must be off with model.moe.top_k = 1: the one weight would always be 1, and the router learn nothing"
        yield Problem(path, True, rule, f"set {path}=false")
    if moe.top_k > 1 and router.score == "sigmoid" and not router.normalize_top_k:
        rule = "must be on with sigmoid scores: megatron-core always normalises them"
        yield Problem(path, False, rule, f"set {path}=true, or model.moe.router.score=softmax")
    if moe.weights_on_input and (moe.top_k > 1 or config.model.mlp_bias or config.model.activation == "gpt_oss_glu"):
        rule = "needs model.moe.top_k = 1 and experts without biases: megatron-core adds up the weighted inputs of no others"
        yield Problem("model.moe.weights_on_input", True, rule, "set model.moe.weights_on_input=false")
    if router.expert_bias and router.score == "softmax":
        # The weights are p / (sum of the chosen p), and the logits are those of sigmoids (pretrain/model/routers.py).
        path, fix = "model.moe.router.expert_bias", "set model.moe.router.score=sigmoid, or expert_bias=false"
        if not router.normalize_top_k:
            rule = (
                "needs model.moe.router.normalize_top_k with softmax scores: megatron-core normalises what it selects by a bias"
            )
            yield Problem(path, True, rule, fix)
        if router.z_loss_coeff:
            rule = "excludes model.moe.router.z_loss_coeff with softmax scores: the loss would see other logits"
            yield Problem(path, True, rule, f"{fix}, or z_loss_coeff=0")


@reads("model.moe")
def shared_expert_keys(config: Config) -> Iterator[Problem]:
    """The gate and the overlap of a shared expert need one, and the overlap needs the alltoall dispatcher."""
    moe = config.model.moe
    for name in ("shared_gate", "shared_overlap"):
        if getattr(moe, name) and not moe.shared_ffn_hidden_size:
            rule = "needs a shared expert: model.moe.shared_ffn_hidden_size is null"
            yield Problem(f"model.moe.{name}", True, rule, f"set model.moe.shared_ffn_hidden_size, or {name}=false")
    if moe.shared_overlap and moe.dispatcher != "alltoall":
        rule = f"needs model.moe.dispatcher = alltoall, not {moe.dispatcher}"
        yield Problem("model.moe.shared_overlap", True, rule, "set model.moe.dispatcher=alltoall, or shared_overlap=false")


def may_be_flex(config: Config) -> bool:
    """Whether the flex dispatcher is legal for the model on this cluster, for some layout: as `dispatcher_fits` and
    `shared_expert_keys` say.
    """
    moe = config.model.moe
    return has_experts(config) and on_gpu(config) and not moe.pad_to_capacity and not moe.shared_overlap


@reads("model.moe", "parallel.tensor", "parallel.expert", "parallel.expert_tensor", "cluster")
def dispatcher_fits(config: Config) -> Iterator[Problem]:
    """Padding to capacity needs a capacity and the alltoall dispatcher; the flex dispatcher needs GPUs and expert parallelism."""
    moe, p = config.model.moe, config.parallel
    if not has_experts(config):
        return
    if moe.pad_to_capacity and moe.capacity_factor is None:
        rule = "needs model.moe.capacity_factor: without it nothing has a capacity"
        yield Problem("model.moe.pad_to_capacity", True, rule, "set model.moe.capacity_factor, or pad_to_capacity=false")
    if moe.pad_to_capacity and moe.dispatcher != "alltoall":
        rule = f"needs model.moe.dispatcher = alltoall, not {moe.dispatcher}"
        yield Problem("model.moe.pad_to_capacity", True, rule, "set model.moe.dispatcher=alltoall, or pad_to_capacity=false")
    if moe.dispatcher == "flex" and not on_gpu(config):
        rule = "needs GPUs, and DeepEP or HybridEP on them"
        yield Problem("model.moe.dispatcher", "flex", rule, "set model.moe.dispatcher=alltoall, or name cluster.gpu")
    if moe.dispatcher == "flex" and p.expert_tensor * p.expert == 1:
        rule = "needs parallel.expert x parallel.expert_tensor > 1"
        yield Problem("model.moe.dispatcher", "flex", rule, "set model.moe.dispatcher=alltoall")


@reads("model.moe", "batch", "parallel.tensor", "parallel.sequence", "parallel.context")
def capacity_fits_micro_batch(config: Config) -> Iterator[Problem]:
    """An expert that is padded to its capacity takes that many different tokens of one rank's micro-batch.

    Capacity is ceil(T k f / E): T tokens of a rank, top_k k, capacity_factor f, E experts (GShard, arXiv 2006.16668).
    """
    moe, p, batch = config.model.moe, config.parallel, config.batch
    if not has_experts(config) or not moe.pad_to_capacity or moe.capacity_factor is None:
        return
    split = p.context * (p.tensor if sequence_parallel(config) else 1)
    tokens = batch.micro_batch_seqs * batch.seq_length_tokens // split
    capacity = math.ceil(tokens * moe.top_k / moe.num_experts * moe.capacity_factor)
    if tokens and capacity > tokens:
        most = math.floor(100 * moe.num_experts / moe.top_k) / 100
        rule = (
            f"padding an expert to its capacity, ceil({tokens} x {moe.top_k} / {moe.num_experts} x factor) = {capacity}, needs "
            f"more than the {tokens} tokens of a rank's micro-batch"
        )
        fix = f"set model.moe.capacity_factor to {most:g} or less, or model.moe.pad_to_capacity=false"
        yield Problem("model.moe.capacity_factor", moe.capacity_factor, rule, fix)


RULES = (
    expert_biases,
    pattern_fits,
    expert_keys_need_experts,
    top_k_fits,
    router_groups,
    router_weights,
    shared_expert_keys,
    dispatcher_fits,
    capacity_fits_micro_batch,
)
