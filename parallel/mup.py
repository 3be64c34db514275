"""Maximal update parametrization for Adam: how initial values and learning rates of a weight depend on the model's width.

In: canonical names and shapes (pretrain/model/shards.py). Out: factors. Source: Yang et al., Tensor Programs V (arXiv
2203.03466), table 3, the form without multipliers in the forward pass: a checkpoint is exported like any other. m is hidden_size
over model.mup.base_hidden_size. All other widths are taken to grow with it: heads (not their width), MLPs, experts, latent ranks.

    class    weights                                        initial std   learning rate   weight decay
    input    embeddings, norms, biases                      1             1               1
    hidden   products between two widths, experts too       m^(-1/2)      1 / m           m
    output   output layer, routers, gates of shared experts 1 / m         1 / m           m

The decay's factor keeps learning rate times decay as it is, as MuAdamW of the authors' library does.

Torch-free.
"""

from __future__ import annotations

import math

from configs.model_schema import Model

INPUT, HIDDEN, OUTPUT = "input", "hidden", "output"


def width_multiple(model: Model) -> float:
    """m. 1.0 where model.mup is off."""
    base = model.mup.base_hidden_size
    return model.hidden_size / base if base else 1.0


def width_class(name: str, num_dims: int) -> str:
    """The class of a canonical tensor. `num_dims`: of the whole tensor; experts are stacked."""
    if num_dims < 2 or not name.endswith("weight") or name.startswith("embedding."):
        return INPUT
    is_output = name.startswith("output_layer.") or name.endswith((".router.weight", ".shared_experts.gate_weight"))
    return OUTPUT if is_output else HIDDEN


def init_factor(name: str, num_dims: int, model: Model) -> float:
    """Factor on the standard deviation of a weight's initial values."""
    m = width_multiple(model)
    return {INPUT: 1.0, HIDDEN: 1 / math.sqrt(m), OUTPUT: 1 / m}[width_class(name, num_dims)]


def learning_rate_factor(name: str, num_dims: int, model: Model) -> float:
    """Factor on the learning rate of AdamW. The factor on the weight decay is its inverse."""
    return 1.0 if width_class(name, num_dims) == INPUT else 1 / width_multiple(model)
