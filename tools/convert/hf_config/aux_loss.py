"""The weights of load balancing losses in config.json, and model.moe.router.balance and aux_loss_coeff.

router_aux_loss_coef weighs another loss than ours:

Legend: E experts, k experts per token, L MoE layers, f_e(l) tokens of layer l that choose expert e over all tokens, P_e(l) mean
router probability of expert e in layer l.

transformers (load_balancing_loss_func, the same in every family that has the key, 4.57 to 5.23) pools all layers:
    coef * E * sum_e mean_l f_e(l) * mean_l P_e(l)
Megatron-Core (switch_load_balancing_loss_func) divides by k and adds the losses of the layers:
    coeff * sum_l E / k * sum_e f_e(l) * P_e(l)
With coeff = coef * k / L the two are equal in one layer, in layers that route alike, and at perfect balance, where both are
coef * k. Elsewhere transformers multiplies means over layers, and Megatron-Core means over layers of products.

aux_loss_alpha of DeepSeek's files weighs the same loss as ours: each layer adds
    alpha * sum_e P_e(l) * f_e(l) * E / k
over each sequence where seq_aux is true (DeepSeek-V2, arXiv 2405.04434, equations 23 to 25), else over the micro-batch.

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import Problem
from configs.model_schema import Model
from parallel import architecture as arch
from tools.convert.hf_config.family import wrong_value

ALPHA, BY_SEQUENCE = "aux_loss_alpha", "seq_aux"
NAME, MODEL_KEY = "router_aux_loss_coef", "moe.router.aux_loss_coeff"


@dataclass(frozen=True)
class AuxLossCoefficient:
    """router_aux_loss_coef. `absent`: the value of an absent key. Must follow the settings of top-k and of the MoE layers."""

    absent: float

    def names(self) -> tuple[str, ...]:
        return (NAME,)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        value = self._stated(hf_config)
        wrong = wrong_value(NAME, value, MODEL_KEY, (float,))
        if wrong:
            yield wrong
            return
        model.moe.router.aux_loss_coeff = _rounded(value * _factor(model))

    def _stated(self, hf_config: Mapping[str, Any]) -> Any:
        return self.absent if hf_config.get(NAME) is None else hf_config[NAME]

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        router = model.moe.router
        hf_config[NAME] = 0.0 if router.balance == "none" else _rounded(router.aux_loss_coeff / _factor(model))
        return iter(())

    def note(self, hf_config: Mapping[str, Any], model: Model) -> str | None:
        """How the two values of a model belong together; None when they are equal."""
        ours, theirs = model.moe.router.aux_loss_coeff, self._stated(hf_config)
        if ours == theirs or model.moe.router.balance == "none":
            return None
        return (
            f"config.json: {NAME} = {theirs:g} is model.{MODEL_KEY} = {ours:g} (times top-k / MoE layers = {model.moe.top_k} / "
            f"{sum(arch.moe_layers(model))}): transformers averages over layers and adds up the top-k, Megatron-Core adds up "
            "layers and divides by top-k; equal for layers that route alike"
        )


@dataclass(frozen=True)
class DeepSeekBalance:
    """aux_loss_alpha and seq_aux of DeepSeek's own modeling code. Absent keys have that code's defaults: 0.001 and true."""

    def names(self) -> tuple[str, ...]:
        return (ALPHA, BY_SEQUENCE)

    def read(self, hf_config: Mapping[str, Any], model: Model) -> Iterator[Problem]:
        alpha, by_sequence = (
            default if hf_config.get(name) is None else hf_config[name] for name, default in ((ALPHA, 0.001), (BY_SEQUENCE, True))
        )
        wrong = wrong_value(ALPHA, alpha, MODEL_KEY, (float,))
        problems = [wrong] if wrong else []
        if not isinstance(by_sequence, bool):
            rule = "must be true or false: it sets model.moe.router.balance"
            problems.append(Problem(f"config.json: {BY_SEQUENCE}", by_sequence, rule, "mend the config.json"))
        if problems:
            yield from problems
            return
        router = model.moe.router
        router.aux_loss_coeff, router.balance = float(alpha), "seq_aux_loss" if by_sequence else "aux_loss"

    def write(self, model: Model, hf_config: dict[str, Any]) -> Iterator[str]:
        router = model.moe.router
        hf_config[ALPHA] = 0.0 if router.balance == "none" else router.aux_loss_coeff
        hf_config[BY_SEQUENCE] = router.balance in ("seq_aux_loss", "none")
        return iter(())

    def note(self, hf_config: Mapping[str, Any], model: Model) -> str | None:
        """Only losses over a sequence or a micro-batch have a word in config.json."""
        if model.moe.router.balance != "global_aux_loss":
            return None
        return f"config.json: {BY_SEQUENCE} has no word for model.moe.router.balance = global_aux_loss: false is the nearest"


def _factor(model: Model) -> float:
    """k / L; 1 for a config whose MoE layers or top-k are missing, which has problems of its own."""
    layers = sum(arch.moe_layers(model))
    return model.moe.top_k / layers if layers and model.moe.top_k else 1.0


def _rounded(value: float) -> float:
    """A converted value: 15 digits, or the number of 12 that it misses by rounding only. A round trip gives the same number."""
    short = float(f"{value:.12g}")
    return short if math.isclose(short, value, rel_tol=1e-14) else float(f"{value:.15g}")
