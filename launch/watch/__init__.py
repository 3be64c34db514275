"""Ranks seen from outside: heartbeats, hangs, stacks, failures."""
