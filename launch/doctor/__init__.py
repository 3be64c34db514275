"""`phalanx doctor`: is this machine, or each node of an allocation, fit to train? NodeFacts are collected apart from judged."""
