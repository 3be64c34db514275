"""Observing the ranks from outside their processes: heartbeats, hangs, stacks and failures."""
