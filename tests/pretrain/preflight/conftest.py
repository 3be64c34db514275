"""The data fixtures, shared with the readers' tests."""

from tests.pretrain.data.conftest import config, tokenizer

__all__ = ["config", "tokenizer"]
