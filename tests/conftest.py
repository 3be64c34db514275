"""What all tests share: one thread of torch, one small tokenised corpus made by the real commands' functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.process import importing

with importing():
    from pretrain.tokenizer import load_tokenizer, section_for
    from tests import keep_groups
    from tools.data.corpus import expand
    from tools.data.tokenize import tokenize
    from tools.data.tokenizer import train

keep_groups.install()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Where the test files import torch, two engines and transformers."""
    with importing():
        return (yield)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.model, tokenizer.json and embedded.bin/.idx/.meta.json of half a megabyte."""
    made = tmp_path_factory.mktemp("data")
    sources = expand(["embedded"])
    train(sources, str(made / "tok.model"), vocab_size=700, max_bytes=5e5)
    tokenize(sources, load_tokenizer(section_for(str(made / "tok.model"))), str(made / "embedded"), max_bytes=5e5)
    return made
