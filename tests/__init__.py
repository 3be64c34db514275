"""Tests mirror the source. `parallel` is imported first: it prepares megatron for CPUs."""

import parallel  # noqa: F401
