"""Tensors of a conversion: canonical names, spans of rows, what lies where in which file."""
