"""What the data tests make of the shared corpus (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from configs import schema
from pretrain.data.tokenizer import TextTokenizer, load_tokenizer, section_for
from tools.data.dataset_writer import DatasetWriter


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> TextTokenizer:
    return load_tokenizer(section_for(str(folder / "tok.model")))


def write_pair(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
    """Token files with these documents."""
    with DatasetWriter(str(prefix), np.dtype(dtype)) as writer:
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
