"""The check of a config's data before any rank starts. In: the config. Out: problems.

It reads headers, up to two million entries of each index and 16 blocks of tokens, which takes about 0.1 s for data of any size.

Torch-free.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError, Problem
from configs.schema import BlendPart, Config
from pretrain.data.indexed import Index, held_out, index_problems, meta_path, open_index, samples_in
from pretrain.data.order_cache import cache_folder, needs_cache
from pretrain.data.tokenizer import TextTokenizer, load_tokenizer, vocab_size

SAMPLED_BLOCKS = 16
SAMPLED_TOKENS = 1 << 15
SMALLEST_SHARE = 1e-5
"""The smallest share of a blend's part, see pretrain/data/blend.py."""


def check_data(config: Config) -> list[Problem]:
    """Every problem of the `data` section and its files. Bad input raises no exception."""
    problems: list[Problem] = []
    tokenizer = None
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
    except ConfigError as error:
        problems += error.problems
    if tokenizer and vocab_size(config, tokenizer) < tokenizer.vocab_size:
        rule = f"must be at least the tokenizer's {tokenizer.vocab_size} tokens"
        problems.append(Problem("model.vocab_size", config.model.vocab_size, rule, "leave model.vocab_size unset, or raise it"))
    if not config.data.train:
        fix = "name data, e.g. data.train=[{path: data/train}], or make it: phalanx data tokenize"
        problems.append(Problem("data.train", [], "a run needs something to train on", fix))
    opened: dict[str, list[Index]] = {}
    for split in ("train", "valid"):
        parts: list[BlendPart] = getattr(config.data, split)
        problems += _share_problems(parts, split)
        opened[split] = []
        for number, part in enumerate(parts):
            index, found = _check_part(part, f"data.{split}[{number}].path", config, tokenizer)
            problems += found
            opened[split] += [index] if index else []
    complete = all(len(opened[split]) == len(getattr(config.data, split)) for split in opened)
    if config.data.train and complete:
        problems += _length_problems(config, opened["train"], opened["valid"])
    return problems


def _share_problems(parts: list[BlendPart], split: str) -> list[Problem]:
    total = sum(part.weight for part in parts)
    return [
        Problem(
            f"data.{split}[{number}].weight",
            part.weight,
            f"a part's share of the blend must be at least {SMALLEST_SHARE:g}, it is {part.weight / total:g}",
            "raise its weight, or leave the part out",
        )
        for number, part in enumerate(parts)
        if not part.weight / total >= SMALLEST_SHARE
    ]


def _check_part(part: BlendPart, key: str, config: Config, tokenizer: TextTokenizer | None) -> tuple[Index | None, list[Problem]]:
    """(index, problems) of one part. The index is None when it is damaged."""
    try:
        index = open_index(part.path, key)
    except ConfigError as error:
        return None, error.problems
    problems = index_problems(index, key)
    if problems:
        return None, problems
    meta, problems = read_meta(part.path, key)
    if tokenizer:
        problems += meta_problems(part.path, meta, index, tokenizer, key)
        problems += _token_problems(index, vocab_size(config, tokenizer), key)
    return index, problems


def read_meta(prefix: str, key: str) -> tuple[dict[str, Any] | None, list[Problem]]:
    """(content of PREFIX.meta.json, problems). The content is None without the file, which other tools don't write."""
    path = meta_path(prefix)
    if not path.exists():
        return None, []
    try:
        meta = json.loads(path.read_text("utf-8"))
        if not isinstance(meta, dict) or not isinstance(meta.get("tokenizer"), dict):
            raise ValueError("no mapping with a tokenizer in it")
    except (ValueError, OSError) as error:
        rule = f"the file must be what phalanx data tokenize wrote: {error}"
        return None, [Problem(key, str(path), rule, "tokenise again, or remove the file to do without it")]
    return meta, []


def meta_problems(prefix: str, meta: dict[str, Any] | None, index: Index, tokenizer: TextTokenizer, key: str) -> list[Problem]:
    """Problems where PREFIX.meta.json contradicts the index or the tokenizer."""
    if meta is None:
        return []
    problems = []
    stated = (meta.get("num_documents"), meta.get("num_tokens"))
    if stated != (index.num_documents, index.num_tokens):
        rule = f"it states {stated} documents and tokens, the index has {(index.num_documents, index.num_tokens)}"
        problems.append(Problem(key, str(meta_path(prefix)), rule, "the files don't belong together: tokenise again"))
    made_with = meta["tokenizer"].get("sha256")
    if made_with != tokenizer.sha256:
        rule = f"the data was tokenised with another tokenizer (sha256 {str(made_with)[:12]}…) than the run's"
        rule += f" {tokenizer.path} ({tokenizer.sha256[:12]}…)"
        problems.append(Problem(key, prefix, rule, "set data.tokenizer to that one, or tokenise the data again"))
    elif meta.get("append_eod") and meta["tokenizer"].get("eod_id") != tokenizer.eod_id:
        rule = f"documents end with token {meta['tokenizer'].get('eod_id')}, the run takes {tokenizer.eod_id} for the end"
        problems.append(Problem(key, prefix, rule, "set data.tokenizer.eod as it was when the data was tokenised"))
    return problems


def _token_problems(index: Index, vocab: int, key: str) -> list[Problem]:
    """The first token id outside the vocabulary as a problem, searched in blocks that are spread evenly over the .bin."""
    tokens = index.tokens()
    last = max(len(tokens) - SAMPLED_TOKENS, 0)
    for first in np.unique(np.linspace(0, last, SAMPLED_BLOCKS).astype(np.int64)):
        block = np.asarray(tokens[int(first) : int(first) + SAMPLED_TOKENS])
        wrong = np.flatnonzero((block < 0) | (block.astype(np.int64) >= vocab))
        if wrong.size:
            at = int(wrong[0])
            rule = f"token ids must be from 0 to below the vocabulary of {vocab}, token {int(first) + at} is {int(block[at])}"
            fix = "tokenise the data with the run's tokenizer"
            return [Problem(key, index.prefix, rule, fix)]
    return []


def _length_problems(config: Config, train: list[Index], valid: list[Index]) -> list[Problem]:
    """Problems of parts without a single sample, and of a validation without data."""
    seq, data = config.batch.seq_length_tokens, config.data
    fraction = 0.0 if valid else data.valid_fraction
    problems = []
    for number, index in enumerate(train):
        rest = held_out(index, fraction)[0]
        tokens = index.tokens_before(rest.stop)
        if not samples_in(index, rest, seq):
            rule = f"one sample needs batch.seq_length_tokens + 1 = {seq + 1} tokens, the part has {tokens} to train on"
            fix = "give more text, or lower batch.seq_length_tokens"
            problems.append(Problem(f"data.train[{number}].path", data.train[number].path, rule, fix))
        elif needs_cache(len(rest), samples_in(index, rest, seq)):
            problems += _cache_problems(cache_folder(data, data.train[number].path))
    for number, index in enumerate(valid):
        if not samples_in(index, range(index.num_sequences), seq):
            rule = f"one sample needs batch.seq_length_tokens + 1 = {seq + 1} tokens, the part has {index.num_tokens}"
            fix = "give more text, or lower batch.seq_length_tokens"
            problems.append(Problem(f"data.valid[{number}].path", data.valid[number].path, rule, fix))
    if config.run.eval_batches and not valid and fraction and not problems:
        most = max(samples_in(index, held_out(index, fraction)[1], seq) for index in train)
        if not most:
            rule = f"the documents held out must hold one sample of {seq + 1} tokens; no part's last {fraction:g} does"
            fix = "raise data.valid_fraction, name data.valid, or set run.eval_batches=0"
            problems.append(Problem("data.valid_fraction", fraction, rule, fix))
    return problems


def _cache_problems(folder: Path) -> list[Problem]:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return []
    fix = "set data.cache_dir to a folder that can be written and that every rank sees"
    return [Problem("data.cache_dir", str(folder), "the shuffled indices of large data must be kept in a folder", fix)]
