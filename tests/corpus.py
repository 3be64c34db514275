"""One small tokenised corpus, made by the real commands' functions."""

from __future__ import annotations

from pathlib import Path

from pretrain.data.tokenizer import load_tokenizer, section_for
from tools.data.read.find_files import expand
from tools.data.tokenize import tokenize
from tools.data.train_tokenizer import train


def make_corpus(folder: Path) -> None:
    """tok.model, tokenizer.json and embedded.bin/.idx/.meta.json of half a megabyte."""
    sources = expand(["embedded"])
    train(sources, str(folder / "tok.model"), vocab_size=700, max_bytes=5e5)
    tokenize(sources, load_tokenizer(section_for(str(folder / "tok.model"))), str(folder / "embedded"), max_bytes=5e5)
