"""`phalanx report`: a run as a page for the browser."""
