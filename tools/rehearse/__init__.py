"""`phalanx rehearse`: compares a layout on CPU ranks with one process, on a small model of the same kind."""
