"""Tensors of a conversion: canonical names and shapes, row mappings, readers."""
