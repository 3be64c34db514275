"""Parallelism: degrees, grids, stages, legality (all without torch), and what a rank needs to join them.

Importing this package registers the finder of `parallel.cpu`; it costs microseconds and imports nothing heavy.
Every module of ours that imports megatron lives in `parallel` or above it, so the finder is always there in time.
"""

from parallel import cpu

cpu.register()
