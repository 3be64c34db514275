"""Runs on this machine: starting the ranks, forwarding signals to them and ending them."""
