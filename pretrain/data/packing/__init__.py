"""Best-fit packing: whole documents into sequences, shuffled without a table of the order."""
