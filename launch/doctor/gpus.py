"""What nvidia-smi says about a node's GPUs. In: nothing, or its output. Out: facts as plain values.

nvidia-smi and not torch: it also answers where torch was built without CUDA, and it alone knows of faults and clocks.

Torch-free.
"""

from __future__ import annotations

import subprocess
from typing import Any

TIMEOUT_S = 30.0
# Our name → nvidia-smi's. The second group is missing on some cards and old drivers, and an unknown field fails the query.
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
    """{"error", "gpus"}: a row a GPU; `error` is empty, or why there are none (no nvidia-smi, no driver)."""
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
    """Rows of nvidia-smi's CSV. What a card doesn't know ([N/A], [Not Supported]) is None."""
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
