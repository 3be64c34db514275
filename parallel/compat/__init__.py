"""Everything that we replace or correct in libraries: Megatron-Core on CPUs, guards against silent faults of engines."""
