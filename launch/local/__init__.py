"""Ranks on this machine: starting them, passing signals on, ending them."""
