"""Which configs are legal: rules between keys, the table of engines and layouts, notices. Nothing here imports torch."""
