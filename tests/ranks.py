"""Forked gloo ranks, as the rehearsal starts them."""

from __future__ import annotations

from tools.rehearse.local_ranks import RankFailed, run_ranks

__all__ = ["RankFailed", "run_ranks"]
