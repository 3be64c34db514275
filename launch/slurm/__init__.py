"""A run as a Slurm job: its script, its batch step, its life over requeues."""
