"""Parallelism: degrees, grids, stages, legality (all without torch), and what a rank needs to join them.

Importing this package registers the finder of `parallel.compat.megatron_cpu`; it costs microseconds and imports nothing heavy.
Every module of ours that imports megatron lives in `parallel` or above it, so the finder is always there in time.
"""

from parallel.compat import megatron_cpu as cpu

cpu.register()
