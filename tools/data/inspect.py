"""What a tokenized corpus or a tokenizer holds, as text and as JSON.

In: a prefix or a tokenizer file. Out: a dict; `render` makes text of it. The whole index is checked, and the whole .bin is
read once, in blocks of 64 MiB.

Torch-free.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from configs.errors import ConfigError, Problem
from pretrain.data.indexed import Index, index_problems, index_sha256, open_index
from pretrain.data.tokenizer import TextTokenizer, load_tokenizer, section_for
from pretrain.preflight.data import meta_problems, read_meta
from tools.data.tokenize import entropy_nats

BLOCK_TOKENS = 1 << 24
SAMPLE_CHARS = 400
ROUND_TRIP = "def f(x):\n\treturn  x + 12   # naïve 日本語 🎉\n\n"


def inspect_tokenizer(path: str) -> dict[str, Any]:
    """Identity, end-of-document token, and whether a difficult text survives encoding and decoding. Raises ConfigError."""
    tokenizer = load_tokenizer(section_for(path))
    ids = tokenizer.encode(ROUND_TRIP)
    return {
        "path": path,
        **tokenizer.identity(),
        "eod_id": tokenizer.eod_id,
        "eod": tokenizer.token(tokenizer.eod_id),
        "round_trip": tokenizer.decode(ids) == ROUND_TRIP,
        "sample_text": ROUND_TRIP,
        "sample_tokens": [tokenizer.token(i) for i in ids],
    }


def inspect_data(prefix: str, tokenizer_path: str | None, num_documents: int) -> dict[str, Any]:
    """Counts, lengths, entropy and the first documents. Raises ConfigError with all problems instead."""
    index = open_index(prefix, "PREFIX")
    tokenizer = load_tokenizer(section_for(tokenizer_path)) if tokenizer_path else None
    meta, problems = read_meta(prefix, "PREFIX")
    problems += index_problems(index, "PREFIX", limit=None)
    if problems:
        raise ConfigError(problems)
    counts = _counts(index)
    if tokenizer:
        problems += meta_problems(prefix, meta, index, tokenizer, "PREFIX")
        if len(counts) > tokenizer.vocab_size:
            rule = f"token ids must be below the tokenizer's {tokenizer.vocab_size}, the largest is {len(counts) - 1}"
            problems.append(Problem("PREFIX", prefix, rule, "give the tokenizer that the data was made with"))
    if problems:
        raise ConfigError(problems)
    lengths = np.diff(np.asarray(index.documents))
    if index.num_sequences == index.num_documents:
        lengths = index.lengths
    return {
        "prefix": prefix,
        "ok": True,
        "num_documents": index.num_documents,
        "num_sequences": index.num_sequences,
        "num_tokens": index.num_tokens,
        "dtype": index.dtype.name,
        "bin_bytes": index.bin_bytes,
        "idx_sha256": index_sha256(prefix),
        "distinct_tokens": int((counts > 0).sum()),
        "max_token_id": len(counts) - 1,
        "unigram_entropy_nats": entropy_nats(counts),
        "length_tokens": {"min": int(lengths.min()), "mean": float(lengths.mean()), "max": int(lengths.max())},
        "length_histogram": _histogram(lengths),
        "meta": meta,
        "documents": [_document(index, number, tokenizer) for number in range(min(num_documents, index.num_documents))],
    }


def _counts(index: Index) -> np.ndarray:
    """Frequency of each id: int64 [largest id + 1]. Raises ConfigError for a negative id."""
    tokens, counts = index.tokens(), np.zeros(0, np.int64)
    for first in range(0, len(tokens), BLOCK_TOKENS):
        block = np.asarray(tokens[first : first + BLOCK_TOKENS])
        if block.min() < 0:
            at = first + int(np.flatnonzero(block < 0)[0])
            raise ConfigError(Problem("PREFIX", index.prefix, f"no token id is negative, token {at} is", "tokenise again"))
        found = np.bincount(block)
        longest = max(len(found), len(counts))
        counts = np.pad(counts, (0, longest - len(counts))) + np.pad(found, (0, longest - len(found)))
    return counts


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Number of documents by length, in bins that double: {from, below, documents}."""
    powers = np.frexp(np.maximum(lengths, 0).astype(np.float64))[1]  # 0 → 0, 1 → 1, 2..3 → 2, 4..7 → 3
    return [
        {"from": 0 if power == 0 else 1 << (power - 1), "below": 1 << power, "documents": int(count)}
        for power, count in enumerate(np.bincount(powers))
        if count
    ]


def _document(index: Index, number: int, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    ids = index.document_tokens(number)
    shown = [int(i) for i in ids[:SAMPLE_CHARS]]
    text = tokenizer.decode(shown)[:SAMPLE_CHARS] if tokenizer else None
    return {"document": number, "tokens": len(ids), "first_ids": shown[:16], "text": text}


def render(found: dict[str, Any]) -> str:
    """The JSON document as text."""
    plain = [(name, value) for name, value in found.items() if name not in ("length_histogram", "documents", "meta")]
    width = max(len(name) for name, _ in plain)
    lines = [f"{name:<{width}}  {_show(value)}" for name, value in plain]
    if histogram := found.get("length_histogram"):
        most = max(row["documents"] for row in histogram)
        lines += ["", "documents by length in tokens:"]
        for row in histogram:
            bar = "#" * -(-40 * row["documents"] // most)
            lines.append(f"  {row['from']:>9,} to {row['below'] - 1:>9,}  {row['documents']:>9,}  {bar}")
    for document in found.get("documents", []):
        shown = str(document["text"] or document["first_ids"])
        lines += ["", f"document {document['document']}, {document['tokens']:,} tokens:", shown]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)
