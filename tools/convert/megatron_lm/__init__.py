"""Megatron-LM checkpoints (torch_dist), read without megatron-core and torch. Pickles are read through an allow-list."""
