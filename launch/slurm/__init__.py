"""Runs training as a Slurm job: the batch script, the batch step, and the lifecycle of a run across requeues."""
