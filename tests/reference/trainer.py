"""A trainer that shares nothing with the package but its config loader: what a run must give, from papers and transformers.

In: a run's config file, the initial weights as a Hugging Face folder, the id of the end-of-document token. Out: the numbers of
each step, the gradient of the first, the weights after the last, the held-out loss.

The loss of a step is the mean over the valid tokens of the global batch, plus for each routed layer
- coeff x load balance, the mean over micro-batches (or sequences) of E x sum over experts of f x P, with f the share of the
  choices and P the mean probability: Switch Transformer (arXiv 2101.03961); DeepSeek-V2 by sequence (arXiv 2405.04434); with f
  of all micro-batches so far and all data parallel ranks (arXiv 2501.11873),
- coeff x mean of logsumexp(logits)^2 over all tokens: ST-MoE (arXiv 2202.08906),
plus coeff / depths x the losses of the prediction depths over the same number of tokens (arXiv 2412.19437, equation 24).
After each step the selection bias moves by rate x sign(mean load - load): arXiv 2408.15664.
Weights move by AdamW, with muP's rates where it is on (arXiv 2203.03466, table 3), or by Muon (tests/reference/muon.py).

Shapes: b sequences, s tokens, E experts, k experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from configs.load import load_config
from tests.reference.data import Sample, Stream, open_data
from tests.reference.model import Output, Reference, Routed
from tests.reference.muon import Muon, qk_clip


@dataclass
class Judged:
    """`rows`: per step the names and values that a run's record has; `gradient` of step 1 before clipping, by parameter."""

    rows: list[dict[str, float]] = field(default_factory=list)
    gradient: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """tokens, labels, documents [b, s] int64; weights [b, s] float32."""

    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    documents: torch.Tensor | None


def train(config_file: Path, weights: Path, eod: int, data_parallel: int = 1) -> Judged:
    """`data_parallel` matters to global_aux_loss alone: how many micro-batches are counted at once."""
    torch.manual_seed(0)
    config: Any = load_config(str(config_file)).config
    model = Reference(weights, config.model.mtp.num_layers)
    training, held_out = open_data(config, eod)
    parameters = dict(model.named_parameters())
    muon = Muon(model, config)
    by_adam = {name: tensor for name, tensor in parameters.items() if name not in muon.parameters}
    moments = {name: (torch.zeros_like(tensor), torch.zeros_like(tensor)) for name, tensor in by_adam.items()}
    judged = Judged()
    size = config.batch.global_batch_seqs
    for step in range(config.run.steps):
        batches = micro_batches(training, step * size, config)
        model.forget_logits()
        row = one_step(model, batches, config, data_parallel)
        gradient = {name: tensor.grad.clone() for name, tensor in parameters.items() if tensor.grad is not None}
        assert gradient.keys() == parameters.keys(), "every parameter takes part"
        if step == 0:
            judged.gradient = gradient
        norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in gradient.values()))
        row |= {"grad_norm": norm, "lr": learning_rate(step, config)}
        limit = config.optimizer.clip_grad_norm
        factor = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        gradient = {name: tensor * factor for name, tensor in gradient.items()}
        muon.step(gradient, row["lr"])
        if config.optimizer.muon.qk_clip is not None:
            qk_clip(model, config)
        update(by_adam, gradient, moments, row["lr"], step + 1, config)
        judged.rows.append(row)
    judged.rows[-1]["val_loss"] = validate(model, held_out, config)
    judged.weights = model.tensors()
    return judged


def micro_batches(stream: Stream, first: int, config: Any) -> list[Batch]:
    """The samples first, first + 1, … of one global batch, cut in their order."""
    size, micro = config.batch.global_batch_seqs, config.batch.micro_batch_seqs
    samples = [stream[number] for number in range(first, first + size)]
    return [to_batch(samples[i : i + micro], config) for i in range(0, size, micro)]


def to_batch(samples: list[Sample], config: Any) -> Batch:
    tokens = torch.stack([torch.from_numpy(sample.tokens) for sample in samples])
    weights = torch.stack([torch.from_numpy(sample.weights) for sample in samples])
    documents = torch.stack([torch.from_numpy(sample.documents) for sample in samples])
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, documents if config.data.document_mask else None)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over the valid tokens, in nats."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


def one_step(model: Reference, batches: list[Batch], config: Any, data_parallel: int) -> dict[str, float]:
    """Fill the gradients of the global batch, move the selection biases; the step's numbers."""
    model.zero_grad()
    outputs = [model(batch.tokens, batch.documents) for batch in batches]
    valid = sum(float(batch.weights.sum()) for batch in batches)
    main = sum_of([cross_entropy(out.logits, batch.labels, batch.weights) for out, batch in zip(outputs, batches, strict=True)])
    row = {"loss": main.item() / valid}
    total = main / valid
    if model.depths:
        ahead, num_ahead = depth_losses(outputs, batches)
        row["mtp_loss"] = ahead.item() / num_ahead
        total = total + config.model.mtp.loss_coeff / len(model.depths) * ahead / valid
    router = config.model.moe.router
    layers = list(zip(*[out.routed for out in outputs], strict=True))
    if router.balance != "none" and router.aux_loss_coeff > 0:
        balance = torch.stack([balance_loss(list(layer), config, data_parallel) for layer in layers])
        row[router.balance] = balance.mean().item()
        total = total + router.aux_loss_coeff * balance.sum()
    if router.z_loss_coeff > 0:
        squares = torch.stack([torch.cat([part.logits for part in layer]).logsumexp(-1).square().mean() for layer in layers])
        row["z_loss"] = squares.mean().item()
        total = total + router.z_loss_coeff * squares.sum()
    total.backward()
    loads = [load_of(list(layer), config) for layer in layers]
    decoder = loads[: len(loads) - len(model.depths)]
    row["expert_load_max_over_mean"] = max(float(load.max() / load.mean()) for load in decoder)
    row["dead_experts"] = float(sum(int((load == 0).sum()) for load in decoder))
    for bias, load in zip(model.selection_biases(), loads, strict=False):
        bias += router.expert_bias_update_rate * torch.sign(load.mean() - load)
    return row


def sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum()


def depth_losses(outputs: list[Output], batches: list[Batch]) -> tuple[torch.Tensor, float]:
    """(sum of the depths' token losses, number of their tokens): depth k predicts the token after the next k."""
    losses, count = [], 0.0
    for out, batch in zip(outputs, batches, strict=True):
        for depth, logits in enumerate(out.depth_logits, start=1):
            labels, weights = batch.labels[:, depth:], batch.weights[:, depth:]
            losses.append(cross_entropy(logits[:, :-depth], labels, weights))
            count += float(weights.sum())
    return sum_of(losses), count


def load_of(layer: list[Routed], config: Any) -> torch.Tensor:
    """Choices of each expert in the global batch [E]."""
    chosen = torch.cat([part.chosen.flatten() for part in layer])
    return torch.bincount(chosen, minlength=config.model.moe.num_experts).float()


def balance_loss(layer: list[Routed], config: Any, data_parallel: int) -> torch.Tensor:
    """One layer's load balancing loss over the micro-batches of a step. The choices are the best k scores: neither groups nor
    the selection bias take part (DeepSeek-V3, equations 17 to 20)."""
    moe, seq = config.model.moe, config.batch.seq_length_tokens
    scores = []
    for part in layer:
        raw = part.logits.float()
        score = raw.softmax(-1) if moe.router.score == "softmax" else raw.sigmoid() / raw.sigmoid().sum(-1, keepdim=True)
        scores.append(score.view(-1, seq, moe.num_experts))
    chosen = [torch.zeros_like(score).scatter(-1, score.topk(moe.top_k, dim=-1).indices, 1.0) for score in scores]

    def loss(picked: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        share = picked.flatten(0, -2).mean(0) / moe.top_k
        return moe.num_experts * (share * probabilities.flatten(0, -2).mean(0)).sum()

    if moe.router.balance == "aux_loss":
        parts = [loss(*pair) for pair in zip(chosen, scores, strict=True)]
    elif moe.router.balance == "seq_aux_loss":
        parts = [loss(*pair) for pair in zip(torch.cat(chosen), torch.cat(scores), strict=True)]
    else:
        rounds = range(0, len(layer), data_parallel)
        parts = [loss(torch.cat(chosen[: i + data_parallel]), torch.cat(scores[i : i + data_parallel])) for i in rounds]
    return torch.stack(parts).mean()


def learning_rate(step: int, config: Any) -> float:
    """Of update `step`, from 0: a linear rise to the peak, then a cosine or a line down to the least at the horizon."""
    peak, schedule = config.optimizer.lr, config.schedule
    horizon = schedule.horizon_steps or config.run.steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    done = min((step - schedule.warmup_steps) / (horizon - schedule.warmup_steps), 1.0)
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[schedule.kind]
    return schedule.min_lr + (peak - schedule.min_lr) * left


def decays(name: str, tensor: torch.Tensor) -> bool:
    """Matrices do; norms, biases (also those of stacked experts), sinks and other vectors don't."""
    return tensor.dim() > 1 and "bias" not in name


def rate_factor(name: str, tensor: torch.Tensor, config: Any) -> float:
    """muP's factor on Adam's rate: all but embeddings and vectors learn slower by the multiple of the width."""
    model = config.model
    is_input = tensor.dim() == 1 or "bias" in name or "embed_tokens" in name
    return 1.0 if is_input or model.mup.base_hidden_size is None else model.mup.base_hidden_size / model.hidden_size


def update(
    parameters: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]],
    rate: float,
    count: int,
    config: Any,
) -> None:
    """AdamW (arXiv 1711.05101). `gradients`: clipped. The decay is rate x weight_decay whatever muP's factor on the rate."""
    optimizer = config.optimizer
    with torch.no_grad():
        for name, tensor in parameters.items():
            first, second = moments[name]
            gradient = gradients[name]
            first.mul_(optimizer.beta1).add_(gradient, alpha=1 - optimizer.beta1)
            second.mul_(optimizer.beta2).addcmul_(gradient, gradient, value=1 - optimizer.beta2)
            if decays(name, tensor):
                tensor.mul_(1 - rate * optimizer.weight_decay)
            root = (second / (1 - optimizer.beta2**count)).sqrt() + optimizer.eps
            own_rate = rate * rate_factor(name, tensor, config)
            tensor.sub_(own_rate * (first / (1 - optimizer.beta1**count)) / root)


def validate(model: Reference, stream: Stream, config: Any) -> float:
    """Mean loss over the first held-out global batches, in nats a token; no dropout, no router losses."""
    loss, valid = 0.0, 0.0
    model.eval()
    with torch.no_grad():
        for number in range(config.run.eval_batches):
            for batch in micro_batches(stream, number * config.batch.global_batch_seqs, config):
                loss += float(cross_entropy(model(batch.tokens, batch.documents).logits, batch.labels, batch.weights))
                valid += float(batch.weights.sum())
    model.train()
    return loss / valid
