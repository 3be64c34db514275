"""Text from a checkpoint, token by token. In: a checkpoint, prompts. Out: the continuation of each prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError, Problem
from pretrain.model.gpt import PaddedVocabGPT
from tools.convert.checkpoints import find_checkpoint, model_of, open_manifest
from tools.convert.megatron_model import loaded_model, logits_of
from tools.convert.tokenizer_files import find_tokenizer


def generate(
    path: Path,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    tokenizer_path: str | None,
) -> dict[str, Any]:
    """{"checkpoint", "texts": [{"prompt", "text", "token_ids", "ended"}]}. Raises ConfigError."""
    folder = find_checkpoint(path)
    manifest = open_manifest(folder)
    model = model_of(manifest)
    tokenizer = find_tokenizer(manifest, folder, tokenizer_path)
    if tokenizer is None:
        rule = "must be given: the run's tokenizer is gone, and the checkpoint came without one"
        raise ConfigError(Problem("--tokenizer", tokenizer_path, rule, "name its tokenizer.model or tokenizer.json"))
    starts = [tokenizer.encode(prompt) or [tokenizer.eod_id] for prompt in prompts]
    longest = max(map(len, starts)) + max_new_tokens
    limit = model.max_position_tokens if model.position.kind == "learned" else None
    if limit and longest > limit:
        rule = f"prompt and continuation must fit into the model's {limit} positions, they have {longest} tokens"
        raise ConfigError(Problem("--max-new-tokens", max_new_tokens, rule, "shorten them"))
    texts = []
    with loaded_model(folder, model, longest) as chunk:
        for prompt, start in zip(prompts, starts):
            # Each prompt has its own random numbers, so that its continuation does not depend on the other prompts.
            drawn = generate_tokens(chunk, start, tokenizer.eod_id, max_new_tokens, temperature, top_k, seed)
            ended = bool(drawn) and drawn[-1] == tokenizer.eod_id
            answer = drawn[:-1] if ended else drawn
            # Prompt and continuation are decoded together: a token may hold part of a character, and some tokenizers drop a
            # leading space.
            whole, head = tokenizer.decode(start + answer), tokenizer.decode(start)
            text = whole[len(head) :] if whole.startswith(head) else tokenizer.decode(answer)
            texts.append({"prompt": prompt, "text": text, "token_ids": drawn, "ended": ended})
    return {"checkpoint": str(folder), "step": manifest.step, "texts": texts}


def generate_tokens(
    chunk: PaddedVocabGPT, start: list[int], end: int, max_new_tokens: int, temperature: float, top_k: int | None, seed: int
) -> list[int]:
    """The tokens that follow `start`, at most `max_new_tokens`. `end` is the last one when it is drawn."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(start)
    while len(tokens) < len(start) + max_new_tokens:
        logits = logits_of(chunk, torch.tensor([tokens]))[0, -1]
        token = sample_token(logits, temperature, top_k, generator)
        tokens.append(token)
        if token == end:
            break
    return tokens[len(start) :]


def sample_token(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits [vocab]. Temperature 0 takes the most likely one."""
    if temperature == 0.0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
