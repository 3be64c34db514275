"""`phalanx doctor`: is this machine, or each node of an allocation, fit to train? Facts are collected apart from judged."""
