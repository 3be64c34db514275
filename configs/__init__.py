"""Configs: the schema, how files and words become one, and the YAML files that ship. The version of Phalanx is here."""

# Its only home: setup.py, provenance and `phalanx --version` read it here.
__version__ = "0.1.0"
