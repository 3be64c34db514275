"""The model of a run in transformers, from an exported folder, with its routers watched and its prediction depths added.

In: a Hugging Face folder. Out: logits, and what each router gave. transformers has no multi-token prediction: it is written
here from DeepSeek-V3 (arXiv 2412.19437, section 2.2), with transformers' own decoder layer inside.

Shapes: b sequences, s tokens, h hidden, E experts, k experts of a token, V vocabulary.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

_ROUTER = re.compile(r"\.mlp\.(gate|router)$")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)\.weight$")


def watched_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float, **more: Any
) -> Any:
    """transformers' own eager attention. The module keeps the largest logit of each head [n], without sinks."""
    with torch.no_grad():
        logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * scaling + mask
        module.largest_logits = torch.maximum(module.largest_logits, logits.amax(dim=(0, 2, 3)))
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, scaling, **more)


AttentionInterface.register("watched", watched_attention)
AttentionMaskInterface.register("watched", eager_mask)


@dataclass(frozen=True)
class Routed:
    """What a router gave: logits [b s, E] with their graph, the experts that it chose [b s, k]."""

    logits: torch.Tensor
    chosen: torch.Tensor


@dataclass(frozen=True)
class Output:
    """Logits [b, s, V] of the next token and of each prediction depth; what each router gave, those of depths last."""

    logits: torch.Tensor
    depth_logits: list[torch.Tensor]
    routed: list[Routed]


class Depth(nn.Module):
    """One prediction depth: the state before it and the embedding of the token ahead, joined, through one more layer."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.enorm = DeepseekV3RMSNorm(width, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(width, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.block: nn.Module = DeepseekV3DecoderLayer(config, layer)
        self.norm = DeepseekV3RMSNorm(width, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, ahead: torch.Tensor, rotary: Any, mask: torch.Tensor) -> torch.Tensor:
        """hidden, ahead [b, s, h] -> [b, s, h], ready for the head."""
        joined = self.eh_proj(torch.cat([self.enorm(ahead), self.hnorm(hidden)], dim=-1))
        return self.norm(self.block(joined, attention_mask=mask, position_embeddings=rotary))


class Reference(nn.Module):
    def __init__(self, folder: Path, num_depths: int) -> None:
        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="watched", dtype=torch.float32)
        body, config = self.model.model, self.model.config
        # A padding token's row would get no gradient; a run has no padding, and the row is like any other.
        body.embed_tokens.padding_idx = None
        self.depths = nn.ModuleList(load_depth(folder, config, config.num_hidden_layers + i) for i in range(num_depths))
        self.routed: list[Routed] = []
        for name, module in self.named_modules():
            if _ROUTER.search(name):
                module.register_forward_hook(self._watch)
        self.forget_logits()
        self.train()

    def attentions(self) -> list[Any]:
        """The attention of each layer and depth. Each has `largest_logits` [n], over all passes since `forget_logits`."""
        return [module for name, module in self.named_modules() if name.endswith(".self_attn")]

    def forget_logits(self) -> None:
        for attention in self.attentions():
            attention.largest_logits = torch.tensor(float("-inf"))

    def _watch(self, router: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        self.routed.append(Routed(output[0], output[2]))

    def forward(self, tokens: torch.Tensor, documents: torch.Tensor | None) -> Output:
        """tokens [b, s]; documents [b, s]: a token sees its own document only, or None."""
        self.routed = []
        body = self.model.model
        mask = None if documents is None else additive_mask(documents)
        hidden = body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden)
        found = []
        for depth in self.depths:
            # Depth k sees the token k places on; the last k places have none, take token 0 and count in no loss.
            tokens = torch.cat([tokens[:, 1:], tokens.new_zeros(len(tokens), 1)], dim=1)
            whole = additive_mask(torch.zeros_like(tokens) if documents is None else documents)
            rotary = body.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])
            hidden = depth(hidden, body.embed_tokens(tokens), rotary, whole)
            found.append(self.model.lm_head(hidden))
        return Output(logits, found, self.routed)

    def selection_biases(self) -> list[torch.Tensor]:
        """DeepSeek-V3's bias of each router [E], in the order of `Output.routed`."""
        return [buffer for name, buffer in self.named_buffers() if name.endswith("e_score_correction_bias")]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that training changes, by name."""
        biases = {name: buffer for name, buffer in self.named_buffers() if name.endswith("e_score_correction_bias")}
        return {name: tensor.detach().clone() for name, tensor in {**dict(self.named_parameters()), **biases}.items()}


def additive_mask(documents: torch.Tensor) -> torch.Tensor:
    """documents [b, s] -> [b, 1, s, s]: 0 where a token may look, else the lowest number."""
    places = torch.arange(documents.shape[1])
    allowed = (documents[:, :, None] == documents[:, None, :]) & (places[:, None] >= places[None, :])
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]


def load_depth(folder: Path, config: Any, layer: int) -> Depth:
    """The layers that follow the model's last one in its files, which transformers leaves out."""
    depth = Depth(config, layer)
    prefix = f"model.layers.{layer}."
    held = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    mine = {name.removeprefix(prefix): tensor for name, tensor in held.items() if name.startswith(prefix)}
    state: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in mine.items():
        if match := _EXPERT.match(name):
            experts.setdefault(match[2], {})[int(match[1])] = tensor
        elif name == "shared_head.norm.weight":
            state["norm.weight"] = tensor
        elif name.split(".")[0] in ("enorm", "hnorm", "eh_proj"):
            state[name] = tensor
        elif name not in ("embed_tokens.weight", "shared_head.head.weight"):
            state[f"block.{name}"] = tensor
    stacks = {kind: torch.stack([tensors[i] for i in range(len(tensors))]) for kind, tensors in experts.items()}
    state["block.mlp.experts.gate_up_proj"] = torch.cat([stacks["gate_proj"], stacks["up_proj"]], dim=1)
    state["block.mlp.experts.down_proj"] = stacks["down_proj"]
    depth.load_state_dict(state)
    return depth.float()
