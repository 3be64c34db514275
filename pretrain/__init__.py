"""The run: model, engine, data, loop, checkpoint, metrics. `parallel` is imported first: it prepares megatron for CPUs."""

import parallel  # noqa: F401
