"""The gradient of each load balancing loss against the loss written out by hand, on routers of one and of two ranks.

Shapes: s tokens of a sequence, b sequences of a micro-batch, h hidden, E experts.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from parallel.compat.index import is_needed
from parallel.groups import make_groups
from parallel.layout import make_layout
from parallel.runtime import start
from parallel.stages import make_chunks
from pretrain.build import make_model
from tests.pretrain.world import VOCAB, small_config
from tests.ranks import run_ranks

SEQ, COEFF, STEPS = 16, 0.7, 2


def hidden_states(seqs: int) -> torch.Tensor:
    """[s, seqs, h]: the sequences of one global batch, the same for every layout."""
    return torch.randn(SEQ, seqs, 32, generator=torch.Generator().manual_seed(5))


def router_gradient(balance: str, micro_batch_seqs: int, num_ranks: int) -> torch.Tensor:
    """Gradient of the balancing loss alone, summed over ranks and divided by the tokens of the global batch [E, h]."""
    return torch.tensor(run_ranks(num_ranks, on_rank, balance, micro_batch_seqs)[0])


def on_rank(balance: str, micro_batch_seqs: int) -> list[list[float]]:
    config = small_config(batch__micro_batch_seqs=micro_batch_seqs, launch__processes_per_node=dist.get_world_size())
    config.model.moe.router.balance, config.model.moe.router.aux_loss_coeff = balance, COEFF
    layout = make_layout(config)
    runtime = start({"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())})
    groups = make_groups(layout, 1)
    chunks = make_chunks(config.model, 1, 1, VOCAB, None)
    (model,) = make_model(config, VOCAB, layout, chunks, groups, runtime.device)
    router = next(module for module in model.modules() if isinstance(module, TopKRouter))
    seqs = micro_batch_seqs * STEPS * dist.get_world_size()
    for step in range(STEPS):
        first = (step * dist.get_world_size() + dist.get_rank()) * micro_batch_seqs
        probs, _ = router(hidden_states(seqs)[:, first : first + micro_batch_seqs].contiguous())
        (probs * 0).sum().backward()
    gradient = router.weight.grad
    assert gradient is not None
    dist.all_reduce(gradient)
    return (gradient / (SEQ * seqs)).tolist()


def by_hand(balance: str, micro_batch_seqs: int, num_ranks: int) -> torch.Tensor:
    """Switch Transformer's E x sum over experts of (share of the choices) x (mean probability), over a micro-batch
    (arXiv 2101.03961), over each sequence (DeepSeek-V2, arXiv 2405.04434), or with the shares of all ranks and of all
    micro-batches so far (arXiv 2501.11873); the mean over what the global batch holds of these."""
    config = small_config()
    seqs = micro_batch_seqs * STEPS * num_ranks
    weight = torch.tensor(run_ranks(1, router_weight)[0], requires_grad=True)
    scores = (hidden_states(seqs) @ weight.T).softmax(dim=-1)
    experts, top_k = config.model.moe.num_experts, config.model.moe.top_k
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(top_k, dim=-1).indices, 1.0)

    def loss(picked: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        share = picked.flatten(0, -2).mean(dim=0) / top_k
        return experts * (share * probs.flatten(0, -2).mean(dim=0)).sum()

    if balance == "seq_aux_loss":
        parts = [loss(chosen[:, i], scores[:, i]) for i in range(seqs)]
    elif balance == "aux_loss":
        spans = [slice(i, i + micro_batch_seqs) for i in range(0, seqs, micro_batch_seqs)]
        parts = [loss(chosen[:, span], scores[:, span]) for span in spans]
    else:
        width = micro_batch_seqs * num_ranks
        parts = [loss(chosen[:, : i + width], scores[:, i : i + width]) for i in range(0, seqs, width)]
    (COEFF * torch.stack(parts).mean()).backward()
    assert weight.grad is not None
    return weight.grad


def router_weight() -> list[list[float]]:
    config = small_config()
    runtime = start({"RANK": "0", "WORLD_SIZE": "1"})
    layout = make_layout(config)
    groups = make_groups(layout, 1)
    (model,) = make_model(config, VOCAB, layout, make_chunks(config.model, 1, 1, VOCAB, None), groups, runtime.device)
    return next(module for module in model.modules() if isinstance(module, TopKRouter)).weight.tolist()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("micro_batch_seqs", [1, 4])
@pytest.mark.parametrize("balance", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_each_balancing_loss_acts_as_its_formula_says(balance: str, micro_batch_seqs: int, num_ranks: int) -> None:
    got, want = router_gradient(balance, micro_batch_seqs, num_ranks), by_hand(balance, micro_batch_seqs, num_ranks)
    assert float(want.norm()) > 1e-4
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.norm()))


@pytest.mark.parametrize(
    ("balance", "micro_batch_seqs", "num_ranks", "fault"),
    [
        ("seq_aux_loss", 4, 1, "The balancing loss of sequences is weighted by the tokens of one sequence"),
        ("global_aux_loss", 1, 2, "The balancing loss of the global batch is weighted by the tokens of one data parallel rank"),
    ],
)
def test_versions_with_the_fault_need_the_weight_and_others_do_without(
    balance: str, micro_batch_seqs: int, num_ranks: int, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = by_hand(balance, micro_batch_seqs, num_ranks)
    monkeypatch.setattr("pretrain.build.weigh_router_losses", lambda chunks: None)
    got = router_gradient(balance, micro_batch_seqs, num_ranks)
    share = 1 / (micro_batch_seqs * num_ranks) if is_needed(fault) else 1.0
    assert float(got.norm() / want.norm()) == pytest.approx(share, rel=1e-4)
