"""`phalanx rehearse`: a layout on CPU ranks against one process, with a small model of the same kind."""
