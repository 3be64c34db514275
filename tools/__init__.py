"""Commands and campaigns around a run. `parallel` is imported first: it prepares megatron for CPUs."""

import parallel  # noqa: F401
