"""Rows of numbers and where they go: console, record, W&B."""
