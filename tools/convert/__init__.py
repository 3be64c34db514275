"""Checkpoints of Hugging Face in and out: streamed, counted, and verified by logits."""
