"""Published runs: rows read, held against predictions, and the fit of the planner to them."""
