"""Configuration: what the user writes, merged, typed and traced. Imports neither torch nor megatron."""
