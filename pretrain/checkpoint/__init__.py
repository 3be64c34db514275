"""Checkpoints: their format, writing, reading, the choice of one to resume from, and the changes that a resume allows."""
