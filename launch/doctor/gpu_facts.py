"""Facts about a node's GPUs from nvidia-smi, as plain values.

nvidia-smi is asked instead of torch because it also works where torch was built without CUDA, and because only
nvidia-smi reports memory errors and throttling.

Torch-free.
"""

from __future__ import annotations

import subprocess
from typing import Any

TIMEOUT_S = 30.0
# Our name → the field of nvidia-smi. Some cards and old drivers lack the second group, and one unknown field fails the query.
BASIC = {"index": "index", "name": "name", "driver": "driver_version", "total_mib": "memory.total", "used_mib": "memory.used"}
HEALTH = {
    "celsius": "temperature.gpu",
    "uncorrected_errors": "ecc.errors.uncorrected.volatile.total",
    "rows_pending": "retired_pages.pending",
    "hot": "clocks_throttle_reasons.hw_thermal_slowdown",
    "power_brake": "clocks_throttle_reasons.hw_power_brake_slowdown",
}
_NUMBERS = ("index", "total_mib", "used_mib", "celsius", "uncorrected_errors")


def gpu_facts() -> dict[str, Any]:
    """{"error", "gpus"} with one row for each GPU. `error` says why there are no rows, for example no nvidia-smi or no driver."""
    error = ""
    for fields in (BASIC | HEALTH, BASIC):
        command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except FileNotFoundError:
            return {"error": "nvidia-smi is not on PATH", "gpus": []}
        except subprocess.TimeoutExpired:
            return {"error": f"nvidia-smi gave no answer within {TIMEOUT_S:g} s", "gpus": []}
        if done.returncode == 0:
            return {"error": "", "gpus": parse_gpus(done.stdout, tuple(fields))}
        said = (done.stdout.strip() or done.stderr.strip()).splitlines()
        error = said[0] if said else f"nvidia-smi ended with exit code {done.returncode}"
    return {"error": error, "gpus": []}


def parse_gpus(text: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of nvidia-smi's CSV output. A field that a card does not support ([N/A], [Not Supported]) is None."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [{name: _value(name, cell) for name, cell in zip(names, row, strict=True)} for row in rows if len(row) == len(names)]


def _value(name: str, cell: str) -> Any:
    if cell.startswith("["):
        return None
    if name in _NUMBERS:
        return int(float(cell)) if cell.replace(".", "", 1).isdecimal() else None
    if name in ("hot", "power_brake", "rows_pending"):
        return cell in ("Active", "Yes")
    return cell
