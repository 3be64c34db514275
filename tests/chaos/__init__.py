"""A seeded campaign against whole runs: `python -m tests.chaos --kills 200 --seed 0 --out report.json`, or `make prove-chaos`."""
