"""Bytes that one rank holds: weights, gradients, optimizer state, activations and buffers; and the memory and speed of GPUs."""
