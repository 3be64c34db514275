"""Loss of a checkpoint on tokenized data.

In: a checkpoint, prefixes (default: the run's validation data). Out: loss in nats per token, perplexity. Each part is read in
order, in windows of seq_length tokens. A window predicts all of its tokens but the first, so that the result depends only on
the data, the window length and the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from configs.errors import ConfigError, Problem
from pretrain.checkpoint.manifest import Manifest
from pretrain.data.indexed import Index, held_out, open_index
from pretrain.model.gpt import PaddedVocabGPT
from tools.convert.checkpoints import find_checkpoint, model_of, open_manifest
from tools.convert.megatron_model import loaded_model, logits_of


def evaluate(path: Path, prefixes: list[str] | None, max_tokens: int, seq_length: int | None, batch_seqs: int) -> dict[str, Any]:
    """{"loss", "perplexity", "tokens", "parts": {prefix: {…}}, …}. Losses are in nats per token. Raises ConfigError."""
    folder = find_checkpoint(path)
    manifest = open_manifest(folder)
    model = model_of(manifest)
    length = seq_length or (manifest.config["batch"]["seq_length_tokens"] if manifest.step else 512)
    if model.position.kind == "learned" and model.max_position_tokens:
        length = min(length, model.max_position_tokens)
    parts = _parts(manifest, prefixes)
    windows = {name: _windows(index, sequences, length, max_tokens, manifest.vocab_size) for name, index, sequences in parts}
    empty = [name for name, found in windows.items() if not len(found)]
    if empty:
        rule = f"must hold at least {length + 1} tokens"
        raise ConfigError([Problem("--data", name, rule, "name more data, or set --seq-length") for name in empty])
    found: dict[str, dict[str, Any]] = {}
    with loaded_model(folder, model, length) as chunk:
        for name, tokens in windows.items():
            total = sum(losses(chunk, tokens, batch_seqs))
            count = tokens.shape[0] * length
            found[name] = {"loss": total / count, "perplexity": _perplexity(total / count), "tokens": count}
    count = sum(part["tokens"] for part in found.values())
    loss = sum(part["loss"] * part["tokens"] for part in found.values()) / count
    return {
        "checkpoint": str(folder),
        "step": manifest.step,
        "loss": loss,
        "perplexity": _perplexity(loss),
        "tokens": count,
        "seq_length_tokens": length,
        "data": list(found),
        "parts": found,
    }


def losses(chunk: PaddedVocabGPT, windows: torch.Tensor, batch_seqs: int) -> Iterator[float]:
    """The summed loss of each batch of windows [n, s + 1]."""
    for batch in windows.split(batch_seqs):
        logits = logits_of(chunk, batch[:, :-1].contiguous())
        yield float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _parts(manifest: Manifest, prefixes: list[str] | None) -> list[tuple[str, Index, range]]:
    """(name, index, sequences) of each part: the prefixes that are named, else the run's validation data, else the part that the
    run holds out of its training data. Raises ConfigError.
    """
    if prefixes:
        named = [
            (
                prefix.removesuffix(".bin").removesuffix(".idx"),
                open_index(prefix.removesuffix(".bin").removesuffix(".idx"), "--data"),
            )
            for prefix in prefixes
        ]
        return [(name, index, range(index.num_sequences)) for name, index in named]
    data = manifest.config.get("data", {})
    if data.get("valid"):
        opened = [(part["path"], open_index(part["path"], "data.valid")) for part in data["valid"]]
        return [(name, index, range(index.num_sequences)) for name, index in opened]
    if not data.get("train"):
        rule = "is needed: this checkpoint belongs to no run that holds data out"
        raise ConfigError(Problem("--data", None, rule, "name PREFIX of PREFIX.bin and PREFIX.idx"))
    opened = [(part["path"], open_index(part["path"], "data.train")) for part in data["train"]]
    return [(name, index, held_out(index, data["valid_fraction"])[1]) for name, index in opened]


def _windows(index: Index, sequences: range, length: int, max_tokens: int, vocab_size: int) -> torch.Tensor:
    """int64 [windows, length + 1]; neighbours share one token. Raises ConfigError for tokens outside of the vocabulary."""
    first = index.tokens_before(sequences.start)
    count = min(index.tokens_before(sequences.stop) - first - 1, max(max_tokens, length)) // length
    if count < 1:
        return torch.empty(0, length + 1, dtype=torch.long)
    tokens = np.asarray(index.tokens()[first : first + count * length + 1], dtype=np.int64)
    if tokens.max() >= vocab_size:
        rule = f"tokens must be below the model's vocabulary of {vocab_size}"
        raise ConfigError(Problem(index.prefix, int(tokens.max()), rule, "evaluate on data of the model's own tokenizer"))
    return torch.from_numpy(np.stack([tokens[at * length : at * length + length + 1] for at in range(count)]))
