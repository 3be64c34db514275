"""Tests mirror the source. `parallel` is imported first: it prepares megatron for CPUs."""

import os

# Before torch is imported: ranks, helpers and tests share two cores, and more threads a process only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import parallel  # noqa: F401
