"""The planner: memory, time and cost of a run from its config alone."""
