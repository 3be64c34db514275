"""One process of a run: its signals, its log, what the ranks decide together, probes and profiles."""
