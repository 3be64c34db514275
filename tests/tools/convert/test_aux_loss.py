"""router_aux_loss_coef: the losses that transformers and Megatron-Core compute on the same router outputs, and a round trip."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import architecture as arch
from tests.tools.convert.test_families import run_export, run_import
from tests.tools.convert.tiny import MODELS, make
from tools.convert.families import family_named
from tools.convert.hf_config.aux_loss import AuxLossCoefficient
from tools.convert.hf_config.preset import interpret_config, read_config

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe")
NUM_EXPERTS, TOP_K, TOKENS, COEF = 8, 3, 50, 0.02


def transformers_loss(family: str, logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    loss = module.load_balancing_loss_func(logits, NUM_EXPERTS, TOP_K)
    assert isinstance(loss, torch.Tensor)
    return COEF * loss


def megatron_loss(coeff: float, logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum over layers of what the router attaches."""
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func  # noqa: PLC0415  (5 s)

    losses = []
    for layer in logits:
        probs = layer.softmax(-1)
        counts = torch.zeros_like(probs).scatter(1, probs.topk(TOP_K).indices, 1.0).sum(0)
        losses.append(switch_load_balancing_loss_func(probs, counts, len(probs), TOP_K, NUM_EXPERTS, coeff))
    return torch.stack(losses).sum()


def coefficient(layers: int) -> float:
    config = {**MODELS["mixtral"][1], "num_hidden_layers": layers, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}
    model, problems = family_named("mixtral").to_model({**config, "router_aux_loss_coef": COEF})
    assert not problems
    return model.moe.router.aux_loss_coeff


@pytest.mark.parametrize("family", FAMILIES)
def test_both_losses_are_equal_on_the_same_router_outputs(family: str) -> None:
    """Value and gradient, in one layer and in layers that route alike; nearly so in layers that differ a little."""
    generator = torch.Generator().manual_seed(3)
    alike = torch.randn(TOKENS, NUM_EXPERTS, generator=generator)
    other = [torch.randn(TOKENS, NUM_EXPERTS, generator=generator) for _ in range(4)]
    one, four = (alike.clone().requires_grad_(),), tuple(alike.clone().requires_grad_() for _ in range(4))
    for logits in (one, four):
        theirs, ours = transformers_loss(family, logits), megatron_loss(coefficient(len(logits)), logits)
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
        for got, want in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-9) and want.abs().max() > 1e-6
    differing = tuple(alike + 0.1 * noise for noise in other)
    assert float(megatron_loss(coefficient(4), differing)) == pytest.approx(float(transformers_loss(family, differing)), rel=0.02)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_the_coefficient_comes_back_and_both_notes_say_what_it_means(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "hf", router_aux_loss_coef=0.9)
    done = run_import(tmp_path / "hf", tmp_path / "checkpoint")
    back = run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert read_config(tmp_path / "out")["router_aux_loss_coef"] == 0.9
    model = interpret_config(read_config(tmp_path / "hf"))[1]
    factor = model.moe.top_k / sum(arch.moe_layers(model))
    assert model.moe.router.aux_loss_coeff == pytest.approx(0.9 * factor, rel=1e-11)
    for notes in (done["notes"], back["notes"]):
        found = [note for note in notes if "router_aux_loss_coef = 0.9 is model.moe.router.aux_loss_coeff" in note]
        assert len(found) == (factor != 1)


def test_the_coefficient_comes_back_for_every_depth() -> None:
    family = family_named("mixtral")
    for layers in range(1, 100):
        config = MODELS["mixtral"][1] | {"num_hidden_layers": layers}
        for value in (0.001, 0.02, 0.0137, 1 / 3):
            value = float(f"{value:.12g}")
            model, _ = family.to_model(config | {"router_aux_loss_coef": value})
            assert family.to_hf_config(model)["router_aux_loss_coef"] == value, layers
            model.moe.router.aux_loss_coeff = value
            again, _ = family.to_model(family.to_hf_config(model))
            assert again.moe.router.aux_loss_coeff == value, layers


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(("by_sequence", "balance"), [(True, "seq_aux_loss"), (False, "aux_loss")])
def test_alpha_of_deepseek_is_taken_as_it_is(name: str, by_sequence: bool, balance: str) -> None:
    config = {**MODELS[name][1], "aux_loss_alpha": 0.003, "seq_aux": by_sequence}
    family = family_named(name)
    model, problems = family.to_model(config)
    assert not problems
    assert (model.moe.router.aux_loss_coeff, model.moe.router.balance) == (0.003, balance)
    back = family.to_hf_config(model)
    assert (back["aux_loss_alpha"], back["seq_aux"]) == (0.003, by_sequence)
    model.moe.router.balance = "none"
    assert family.to_hf_config(model)["aux_loss_alpha"] == 0.0
    model.moe.router.balance = "global_aux_loss"
    assert any("global_aux_loss" in note for note in family.notes(family.to_hf_config(model), model))
    found = [problem.path for problem in family.to_model({**config, "aux_loss_alpha": -1, "seq_aux": "no"})[1]]
    assert found == ["config.json: aux_loss_alpha", "config.json: seq_aux"]


def test_the_paper_of_deepseek_weighs_the_same_loss() -> None:
    """DeepSeek-V2, equations 23 to 25: alpha * sum f_i P_i, f_i = E / (k T) * number of tokens that choose expert i."""
    logits = torch.randn(TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(4))
    scores = logits.softmax(-1)
    chosen = torch.zeros(NUM_EXPERTS)
    for token in scores:
        chosen[token.topk(TOP_K).indices] += 1
    f, p = NUM_EXPERTS / (TOP_K * TOKENS) * chosen, scores.mean(0)
    assert float(megatron_loss(0.003, (logits,))) == pytest.approx(0.003 * float((f * p).sum()), rel=1e-6)


def test_no_balancing_is_a_coefficient_of_0() -> None:
    family = family_named("mixtral")
    model, _ = family.to_model(MODELS["mixtral"][1])
    model.moe.router.balance = "none"
    hf_config: dict[str, Any] = family.to_hf_config(model)
    assert hf_config["router_aux_loss_coef"] == 0.0 and not family.notes(hf_config, model)


def test_every_family_with_the_key_converts_it() -> None:
    for name in FAMILIES:
        assert any(isinstance(setting, AuxLossCoefficient) for setting in family_named(name).settings), name
