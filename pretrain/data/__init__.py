"""Token files to micro-batches: indices, blends, the order of samples, streams."""
