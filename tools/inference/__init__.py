"""Looking at what was trained: text from a checkpoint, and its loss on data. One process, on the CPU."""
