"""The check of a config's data before any rank starts. In: the config. Out: problems.

It reads headers, up to two million entries of each index and 16 blocks of tokens, which takes about 0.1 s for data of any size.

Torch-free.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.data_schema import BlendPart, Data
from configs.errors import ConfigError, Notice, Problem
from configs.schema import Config
from parallel.batch import consumed_seqs_after, steps_of
from pretrain.data.fim import GROWTH_TOKENS
from pretrain.data.indexed import Index, held_out, index_problems, meta_path, open_index, samples_in
from pretrain.data.order_cache import cache_folder, needs_cache
from pretrain.data.packing.part import PackedPart
from pretrain.data.streams import NO_MASKS, fim_growth, is_packed, make_fim, open_train, source_paths, train_phases
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
        make_fim(config, tokenizer)
    except ConfigError as error:
        problems += error.problems
    if tokenizer and vocab_size(config, tokenizer) < tokenizer.vocab_size:
        rule = f"must be at least the tokenizer's {tokenizer.vocab_size} tokens"
        problems.append(Problem("model.vocab_size", config.model.vocab_size, rule, "leave model.vocab_size unset, or raise it"))
    if not config.data.train:
        fix = "name data, e.g. data.train=[{path: data/train}], or make it: phalanx data tokenize"
        problems.append(Problem("data.train", [], "a run needs something to train on", fix))
    problems += _order_problems(config.data)
    if is_packed(config.data) and config.batch.seq_length_tokens + 1 - fim_growth(config.data) < 2:
        rule = f"a packed sample of a fill-in-the-middle document needs {GROWTH_TOKENS + 1} tokens"
        fix = "raise batch.seq_length_tokens, or set data.fim.rate=0"
        problems.append(Problem("batch.seq_length_tokens", config.batch.seq_length_tokens, rule, fix))
    opened: dict[str, list[Index]] = {}
    for blend in blends(config.data):
        problems += _share_problems(blend)
        opened[blend.key] = []
        for number, part in enumerate(blend.parts):
            index, found = _check_part(part, f"{blend.key}[{number}].path", config, tokenizer)
            problems += found
            opened[blend.key] += [index] if index else []
        if len(opened[blend.key]) == len(blend.parts):
            problems += _length_problems(config, blend, opened[blend.key])
    if not problems and not config.data.valid:
        problems += _held_out_problems(config, opened["data.train"])
    return problems


@dataclass(frozen=True)
class NamedBlend:
    """A list of parts in the config. `is_train`: where data.valid is empty, valid_fraction of each part is held out of it."""

    key: str
    parts: list[BlendPart]
    is_train: bool


def blends(data: Data) -> list[NamedBlend]:
    """Every list of parts in the section."""
    phases = [NamedBlend(f"data.phases[{k}].train", phase.train, True) for k, phase in enumerate(data.phases)]
    sets = [NamedBlend(f"data.valid_sets[{k}].parts", one.parts, False) for k, one in enumerate(data.valid_sets)]
    return [NamedBlend("data.train", data.train, True), *phases, NamedBlend("data.valid", data.valid, False), *sets]


def _order_problems(data: Data) -> list[Problem]:
    """Problems of phases that don't follow each other, and of validation sets without a usable name."""
    problems, before = [], 0
    for number, phase in enumerate(data.phases):
        key = f"data.phases[{number}]"
        if phase.from_tokens <= before:
            rule = f"phases begin one after another, this one must begin after {before:,} tokens"
            problems.append(Problem(f"{key}.from_tokens", phase.from_tokens, rule, "sort the phases, or raise it"))
        before = max(before, phase.from_tokens)
    for number, phase in enumerate(data.phases):
        if not phase.train:
            fix = "name data, e.g. train: [{path: data/train}], or leave the phase out"
            problems.append(Problem(f"data.phases[{number}].train", [], "a phase needs something to train on", fix))
    names = [one.name for one in data.valid_sets]
    for number, one in enumerate(data.valid_sets):
        key = f"data.valid_sets[{number}]"
        if not re.fullmatch(r"[\w.-]+", one.name, re.ASCII) or names.index(one.name) < number:
            rule = "a name of letters, digits, dots, - and _ that no other set has"
            problems.append(Problem(f"{key}.name", one.name, rule, "choose another name"))
        if not one.parts:
            problems.append(Problem(f"{key}.parts", [], "a set needs data", "name data, e.g. parts: [{path: data/code}]"))
    return problems


def _share_problems(blend: NamedBlend) -> list[Problem]:
    parts = blend.parts
    total = sum(part.weight for part in parts)
    return [
        Problem(
            f"{blend.key}[{number}].weight",
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


def _length_problems(config: Config, blend: NamedBlend, indices: list[Index]) -> list[Problem]:
    """Problems of parts without a single sample."""
    seq, data, problems = config.batch.seq_length_tokens, config.data, []
    fraction = data.valid_fraction if blend.is_train and not data.valid else 0.0
    for number, index in enumerate(indices):
        rest, part = held_out(index, fraction)[0], blend.parts[number]
        samples = samples_in(index, rest, seq)
        if not _has_sample(config, index, rest):
            rest_text = f"{index.tokens_before(rest.stop)} to train on" if blend.is_train else f"{index.num_tokens}"
            needed = "two" if is_packed(data) else f"batch.seq_length_tokens + 1 = {seq + 1}"
            rule = f"one sample needs {needed} tokens, the part has {rest_text}"
            fix = "give more text, or lower batch.seq_length_tokens"
            problems.append(Problem(f"{blend.key}[{number}].path", part.path, rule, fix))
        elif blend.is_train and needs_cache(len(rest), samples):
            problems += _cache_problems(cache_folder(data, part.path))
    return problems


def _has_sample(config: Config, index: Index, sequences: range) -> bool:
    if not is_packed(config.data):
        return samples_in(index, sequences, config.batch.seq_length_tokens) > 0
    return bool(len(sequences)) and index.tokens_before(sequences.stop) - index.tokens_before(sequences.start) > 1


def _held_out_problems(config: Config, train: list[Index]) -> list[Problem]:
    """The problem of a validation without data."""
    seq, fraction = config.batch.seq_length_tokens, config.data.valid_fraction
    if not (config.run.eval_batches and fraction) or any(_has_sample(config, one, held_out(one, fraction)[1]) for one in train):
        return []
    rule = f"the documents held out must hold one sample of {2 if is_packed(config.data) else seq + 1} tokens; "
    rule += f"no part's last {fraction:g} does"
    fix = "raise data.valid_fraction, name data.valid, or set run.eval_batches=0"
    return [Problem("data.valid_fraction", fraction, rule, fix)]


def source_plan(config: Config) -> list[dict[str, Any]]:
    """Tokens and epochs of each source up to the end of the run: {"source", "tokens", "epochs"}.

    The training data must be legal. An epoch of a source is each of its samples once, and padding is no token. Best-fit packing
    adds {"samples": of an epoch, "padding": its share of them, "cut_documents": share of the documents}, and reads all lengths.
    """
    end = consumed_seqs_after(config.batch, steps_of(config))
    phases = train_phases(config)
    samples = dict.fromkeys(source_paths(config.data), 0.0)
    for (first, parts), (after, _) in zip(phases, [*phases[1:], (end, [])], strict=True):
        total = sum(part.weight for part in parts)
        for part in parts:
            samples[part.path] += part.weight / total * max(min(after, end) - first, 0)
    found = []
    for (path, count), part in zip(samples.items(), open_train(config, NO_MASKS).parts, strict=True):
        epochs = count / part.samples_per_epoch
        row = {"source": path, "tokens": round(epochs * part.tokens_per_epoch), "epochs": epochs}
        if isinstance(part, PackedPart):
            padding = 1 - part.tokens_per_epoch / (part.samples_per_epoch * part.seq_length_tokens)
            row |= {"samples": part.samples_per_epoch, "padding": padding, "cut_documents": part.cut_documents}
        found.append(row)
    return found


def repetition_notices(config: Config, sources: Sequence[dict[str, Any]]) -> tuple[Notice, ...]:
    """A notice for each source that the run repeats more than data.max_epochs times. `sources`: those of `source_plan`."""
    limit, often = config.data.max_epochs, "is read {:,.1f} times by the end of the run, more than {:g}"
    repeated = [row for row in sources if row["epochs"] > limit]
    return tuple(Notice("data.max_epochs", f"{row['source']} {often.format(row['epochs'], limit)}") for row in repeated)


def _cache_problems(folder: Path) -> list[Problem]:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return []
    fix = "set data.cache_dir to a folder that can be written and that every rank sees"
    return [Problem("data.cache_dir", str(folder), "the shuffled indices of large data must be kept in a folder", fix)]
