"""Megatron-Core's compiled helpers, loaded without Megatron-Core."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, threading
import numpy as np
from parallel.compat.megatron_helpers import blending_indices, sample_starts

def read():
    barrier.wait()
    found.append(sample_starts(np.array([5, 7], np.int32), np.array([1, 0], np.int32), 4, 12).tolist())
    found.append(blending_indices(np.array([0.25, 0.75]), 4)[0].tolist())

barrier, found = threading.Barrier(8), []
threads = [threading.Thread(target=read) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 16 and found.count([[0, 0], [0, 4], [1, 1]]) == 8, found
assert "torch" not in sys.modules and "megatron.core" not in sys.modules
import megatron.core.datasets.helpers as theirs
assert blending_indices(np.array([0.25, 0.75]), 4)[0].tolist() in found and theirs.build_blending_indices
"""


def test_threads_that_are_all_the_first_get_the_whole_module() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
