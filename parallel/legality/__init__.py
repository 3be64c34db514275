"""Legal configs: rules between keys, the table of engines and ZeRO stages, notices. Nothing here imports torch."""
