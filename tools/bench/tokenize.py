"""Speed of `phalanx data tokenize`, compared with sentencepiece's own threaded encode on the same text, in one run.

In: how much text. Out: MB/s of both and their ratio, for BPE and unigram. The Phalanx side is the whole command: starting
workers, reading JSON lines, checking, encoding, writing and syncing. The sentencepiece side is `encode(texts, num_threads)`
with the texts in memory. The text is source code of the installed packages: real text without repeated files.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.data.tokenizer import SentencePieceTokenizer, load_tokenizer, section_for
from tools.data.read.find_files import expand
from tools.data.tokenize import tokenize
from tools.data.train_tokenizer import train


def installed_text(max_bytes: float) -> Iterator[str]:
    """Different documents, together about `max_bytes`."""
    seen: set[str] = set()
    size = 0
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        text = path.read_text("utf-8", errors="replace")
        if 1000 < len(text) < 300_000 and text not in seen:
            seen.add(text)
            size += len(text.encode())
            yield text
        if size >= max_bytes:
            return


def _cpu_s() -> float:
    """CPU seconds of this process and of its ended children."""
    return sum(os.times()[:4])


def measure(kind: str, folder: Path, corpus: Path, texts: list[str], workers: int, vocab_size: int) -> dict[str, Any]:
    """One row of the result. On a busy machine, trust the ratio of CPU seconds."""
    model = str(folder / kind / "tokenizer.model")
    train(expand([str(corpus)]), model, vocab_size=vocab_size, kind=kind, max_bytes=4e6)
    tokenizer = load_tokenizer(section_for(model))
    assert isinstance(tokenizer, SentencePieceTokenizer), "a .model is sentencepiece's"
    size_mb = sum(len(text.encode()) for text in texts) / 1e6
    start_s, start_cpu_s = time.monotonic(), _cpu_s()
    tokenizer.processor.encode(texts, num_threads=workers)
    native_s, native_cpu_s = time.monotonic() - start_s, _cpu_s() - start_cpu_s
    start_cpu_s = _cpu_s()
    ours_s = tokenize(expand([str(corpus)]), tokenizer, str(folder / kind / "data"), workers=workers)["elapsed_s"]
    ours_cpu_s = _cpu_s() - start_cpu_s
    return {
        "model": kind,
        "text_mb": size_mb,
        "workers": workers,
        "sentencepiece_mb_per_s": size_mb / native_s,
        "phalanx_mb_per_s": size_mb / ours_s,
        "ratio": native_s / ours_s,
        "processor_ratio": native_cpu_s / ours_cpu_s,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="phalanx bench tokenize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-mb", type=float, default=40.0, help="text to encode (default: 40)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads, and processes (default: cores)"
    )
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--models", nargs="+", default=["bpe", "unigram"], choices=("bpe", "unigram"))
    arguments = parser.parse_args(argv)
    texts = list(installed_text(arguments.max_mb * 1e6))
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name), Path(name) / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        for kind in arguments.models:
            print(json.dumps(measure(kind, folder, corpus, texts, arguments.workers, arguments.vocab_size)), flush=True)
