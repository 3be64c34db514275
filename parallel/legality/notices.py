"""Notices on legal configs: groups that leave the fast network, numbers that depend on the layout, keys without effect.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import Notice
from configs.schema import Config
from parallel.batch import horizon_steps, num_micro_batches, steps_of
from parallel.legality.layout import WORLD
from parallel.legality.rules import data_size, has_experts, on_gpu, reads
from parallel.legality.zero_table import COSTS, applying


def _domain(config: Config) -> tuple[int, str]:
    """(number of ranks that share the fast network, its name): the node without GPUs, else the scale-up domain."""
    if not on_gpu(config):
        return config.launch.processes_per_node, "a node"
    return config.cluster.scaleup_gpus or config.cluster.gpus_per_node, "the scale-up domain"


@reads("parallel", "cluster", *WORLD)
def groups_leave_domain(config: Config) -> Iterator[Notice]:
    """Tensor or expert groups span more than the fast network."""
    p, (domain, what) = config.parallel, _domain(config)
    if config.launch.nodes == 1:
        return
    spans = {
        "parallel.tensor": (p.tensor, "tensor parallel groups reduce activations twice a layer"),
        "parallel.expert_tensor": (p.expert_tensor, "expert tensor groups reduce every expert's output"),
        "parallel.expert": (p.expert_tensor * p.expert if p.expert > 1 else 1, "expert groups send every token twice a layer"),
    }
    for path, (span, cost) in spans.items():
        if span > 1 and (span > domain or domain % span):
            yield Notice(path, f"its groups span {span} ranks and leave {what} of {domain}: {cost}")


@reads("batch", "parallel", *WORLD)
def pipeline_bubble(config: Config) -> Iterator[Notice]:
    """Pipeline stages wait for more than a quarter of a step."""
    p, data = config.parallel, data_size(config)
    if p.pipeline == 1 or data is None or config.batch.global_batch_seqs % (config.batch.micro_batch_seqs * data):
        return
    micro = num_micro_batches(config.batch, data, config.batch.global_batch_seqs)
    bubble = (p.pipeline - 1) / ((p.virtual_pipeline or 1) * micro + p.pipeline - 1)
    if bubble > 0.25:
        text = f"{p.pipeline} stages wait {bubble:.0%} of a step with {micro} micro-batches; more of them shrink the bubble"
        yield Notice("parallel.pipeline", text)


@reads("zero", "parallel", "precision", "model.tie_embeddings", "model.mtp", "model.mla", "recompute.mode")
def zero_costs(config: Config) -> Iterator[Notice]:
    """The table of engines and ZeRO stages (zero_table.py) names a cost for a feature of the run."""
    for feature, entry in applying(config):
        if entry.verdict == COSTS:
            yield Notice(feature.path, f"zero.engine = {entry.engine}: {entry.why}")


@reads("model", "batch.micro_batch_seqs", "batch.global_batch_seqs")
def numbers_depend_on_layout(config: Config) -> Iterator[Notice]:
    """Dropout, jitter, dropped tokens or a balancing loss make the numbers depend on the layout or the micro-batch."""
    model, moe, router = config.model, config.model.moe, config.model.moe.router
    if model.hidden_dropout or model.attention.dropout:
        path = "model.hidden_dropout" if model.hidden_dropout else "model.attention.dropout"
        yield Notice(path, "dropped elements depend on the layout: two layouts train alike, not equal")
    if not has_experts(config):
        return
    if router.jitter_eps:
        yield Notice("model.moe.router.jitter_eps", "the noise depends on the layout: two layouts train alike, not equal")
    if moe.capacity_factor is not None:
        text = "which tokens are dropped depends on the tokens a rank holds: on batch.micro_batch_seqs, context and tensor"
        yield Notice("model.moe.capacity_factor", text)
    if router.balance == "aux_loss" and router.aux_loss_coeff and config.batch.micro_batch_seqs > 1:
        text = "aux_loss balances each micro-batch: changing batch.micro_batch_seqs changes the loss (seq_aux_loss doesn't)"
        yield Notice("model.moe.router.balance", text)
    if router.balance == "global_aux_loss" and router.aux_loss_coeff:
        text = "global_aux_loss adds counts up over micro-batches and data parallel ranks: the loss depends on how they divide"
        yield Notice("model.moe.router.balance", text)


@reads("model.moe")
def nothing_balances(config: Config) -> Iterator[Notice]:
    """No loss and no bias balances the experts."""
    router = config.model.moe.router
    if has_experts(config) and not router.expert_bias and (router.balance == "none" or router.aux_loss_coeff == 0):
        yield Notice("model.moe.router.balance", "nothing balances the experts: some may stop learning")


@reads("model.moe")
def groups_score_logits(config: Config) -> Iterator[Notice]:
    """megatron-core ranks groups of experts by sums of logits when softmax scores are normalised after top-k."""
    router = config.model.moe.router
    if has_experts(config) and router.num_groups and router.score == "softmax" and router.normalize_top_k:
        text = "megatron-core ranks groups by sums of logits here, not of probabilities (normalize_top_k=false ranks by those)"
        yield Notice("model.moe.router.num_groups", text)


@reads("schedule", "run", "batch")
def steps_after_horizon(config: Config) -> Iterator[Notice]:
    """Some steps train after the end of the learning rate schedule."""
    if config.schedule.horizon_steps is None or config.schedule.kind == "constant":
        return
    if (config.run.steps is None) == (config.run.tokens is None):
        return
    steps, horizon = steps_of(config), horizon_steps(config)
    if steps > horizon:
        text = f"the last {steps - horizon} of {steps} steps train at schedule.min_lr = {config.schedule.min_lr:g}"
        yield Notice("schedule.horizon_steps", text)


@reads("model.attention", "batch.seq_length_tokens", "schedule", "run.eval_batches", "run.eval_interval_steps")
def without_effect(config: Config) -> Iterator[Notice]:
    """A key is set that has no effect."""
    window, length = config.model.attention.window_size_tokens, config.batch.seq_length_tokens
    if window is not None and window >= length:
        yield Notice("model.attention.window_size_tokens", f"has no effect: sequences have {length} tokens")
    if window is None and config.model.attention.window_layers != "all":
        yield Notice("model.attention.window_layers", "has no effect: model.attention.window_size_tokens is not set")
    if config.schedule.decay_steps is not None and config.schedule.kind != "wsd":
        yield Notice("schedule.decay_steps", f"has no effect: schedule.kind = {config.schedule.kind}")
    if config.run.eval_interval_steps is not None and config.run.eval_batches == 0:
        yield Notice("run.eval_interval_steps", "has no effect: run.eval_batches = 0")


RULES = (
    groups_leave_domain,
    pipeline_bubble,
    zero_costs,
    numbers_depend_on_layout,
    nothing_balances,
    groups_score_logits,
    steps_after_horizon,
    without_effect,
)
