"""The `optimizer` section: AdamW, and Muon for the hidden matrices with AdamW for everything else.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from configs.fields import key


@dataclass
class Muon:
    """Muon (Jordan et al. 2024; Moonlight, arXiv 2502.16982). In use with optimizer.kind = muon."""

    momentum: float = key(0.95, "Decay rate of the momentum.", low=0, high=0.99999)
    nesterov: bool = key(True, "Orthogonalise the mean of gradient and momentum, weighted by the decay rate (Nesterov).")
    ns_steps: int = key(5, "Newton-Schulz iterations.", low=1, high=100)
    ns_coefficients: str = key(
        "jordan",
        "Coefficients of the iterations. jordan: one triple for all; quintic: five triples that come nearer to 1.",
        choices=("jordan", "quintic"),
    )
    ns_dtype: str = key("bf16", "Number format of the iterations. Rehearsals take fp32.", choices=("bf16", "fp32"))
    scale: str = key(
        "match_rms",
        "Factor on the update of a matrix. match_rms: 0.2 sqrt(max(rows, columns)), the size of AdamW's updates (Moonlight); "
        "spectral: sqrt(max(1, rows / columns)).",
        choices=("match_rms", "spectral"),
    )
    split_heads: str = key(
        "qkv",
        "Matrices of the attention's input projections. none: each projection; qkv: queries, keys and values apart; head: "
        "each head's queries, keys and values apart, under latent attention each head of the up projections.",
        choices=("none", "qkv", "head"),
    )
    split_gate: bool = key(True, "The gate and the up projection of a gated MLP are two matrices.")
    router: str = key("adamw", "Optimizer of the router's weight.", choices=("adamw", "muon"))
    lr_ratio: float = key(1.0, "Muon's learning rate as a multiple of the scheduled one.", above=0)
    qk_clip: Optional[float] = key(
        None,
        "QK-clip (Kimi K2, arXiv 2507.20534): heads whose largest attention logit of a step is above this get smaller query and key "
        "weights. null: no clipping.",
        above=0,
    )
    qk_clip_alpha: float = key(0.5, "Share of the queries in QK-clip's factor, where a head has a key of its own.", low=0, high=1)


@dataclass
class Optimizer:
    kind: str = key(
        "adamw", "Kind of optimizer. muon: Muon for hidden matrices, AdamW for the other parameters.", choices=("adamw", "muon")
    )
    muon: Muon = key(factory=Muon)
    lr: float = key(3e-4, "Peak learning rate.", above=0)
    beta1: float = key(0.9, "Decay rate of the first moment.", low=0, high=0.99999)
    beta2: float = key(0.95, "Decay rate of the second moment.", low=0, high=0.99999)
    eps: float = key(1e-8, "Number added to the root of the second moment.", above=0)
    weight_decay: float = key(0.1, "Decoupled weight decay. Norms, biases and other vectors have none.", low=0)
    clip_grad_norm: float = key(1.0, "Gradients are scaled down to this global norm. 0: no clipping.", low=0)
