"""Checkpoints of Megatron-LM (torch_dist), read without megatron and without torch: allow-listed pickles, streamed tensors."""
