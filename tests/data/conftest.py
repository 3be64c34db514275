"""One tokenizer and one tokenised corpus for all data tests, made by the real commands' functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from configs import schema
from pretrain.tokenizer import Tokenizer, load_tokenizer, section_for
from tools.data.corpus import expand
from tools.data.tokenize import tokenize
from tools.data.tokenizer import train
from tools.data.writer import PairWriter


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.model, tokenizer.json and embedded.bin/.idx/.meta.json of half a megabyte."""
    made = tmp_path_factory.mktemp("data")
    sources = expand(["embedded"])
    train(sources, str(made / "tok.model"), vocab_size=700, max_bytes=5e5)
    tokenize(sources, load_tokenizer(section_for(str(made / "tok.model"))), str(made / "embedded"), max_bytes=5e5)
    return made


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(section_for(str(folder / "tok.model")))


def write_pair(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
    """Token files with these documents."""
    with PairWriter(str(prefix), np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.array(document, dtype).tobytes(), np.array([len(document)], np.int32).tobytes())
        writer.finish({"tokenizer": {}})
    Path(f"{prefix}.meta.json").unlink()
    return str(prefix)


@pytest.fixture
def config(folder: Path) -> schema.Config:
    """A config over the embedded corpus, sequences of 64 tokens."""
    made = schema.Config()
    made.data.tokenizer.path = str(folder / "tok.model")
    made.data.train = [schema.BlendPart(str(folder / "embedded"))]
    made.data.valid_fraction = 0.1
    made.batch.seq_length_tokens = 64
    made.run.steps = 10
    return made
