"""Checkpoints: format, writing, reading, what to go on from, what may change when a run goes on."""
