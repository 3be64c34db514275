"""What one rank holds, in bytes: weights, gradients, optimizer state, activations, buffers, and the GPUs to hold them."""
