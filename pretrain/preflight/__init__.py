"""The preflight: whether a run may start. check, launch, resume and the ranks share its answer."""
