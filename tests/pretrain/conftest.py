"""DeepSpeed for the tests that ask for it."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="module")
def deepspeed_imported() -> None:
    """Forked ranks find DeepSpeed imported (3 s)."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import pretrain.engine.deepspeed  # noqa: F401, PLC0415  (after the line above)
