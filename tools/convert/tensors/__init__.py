"""Tensors of a conversion: canonical names, mappings of rows, what lies where in which file."""
