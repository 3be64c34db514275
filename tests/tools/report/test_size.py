"""A long record makes a page of bounded size, in bounded memory and time."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.report.world import make_run, row

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.prove
@pytest.mark.timeout(600)
def test_100_000_steps_of_40_numbers(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0)
    draw = random.Random(0)
    with open(folder.metrics, "w") as file:
        for step in range(1, 100_001):
            noise = {f"series_{number}": draw.random() for number in range(28)}
            file.write(json.dumps(row(step, loss=3 + draw.random()) | noise) + "\n")
    assert len(row(1)) + 28 >= 40
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["-m", "tools.cli", "report", str(folder.path), "--out", str(tmp_path / "page.html")]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (tmp_path / "page.html").stat().st_size < 6_000_000
    # The largest of all children so far, in KiB.
    assert after.ru_maxrss < 500_000
    # Seconds of the processor: wall time would tell how busy the machine is.
    assert after.ru_utime - before.ru_utime < 10
