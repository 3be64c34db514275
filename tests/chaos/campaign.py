"""Runs cases and checks them. In: cases, a folder with the data. Out: a `Row` for each blow that came."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.data.indexed import token_dtype
from pretrain.data.order_cache import CACHED_ENTRIES
from tests.chaos.check import check_run
from tests.chaos.local_runs import LocalRun, Struck
from tests.chaos.moments import Missed
from tests.chaos.plan import SLURM, Case
from tests.chaos.slurm_runs import SlurmRun
from tests.corpus import make_corpus
from tests.run.world import launch, write_config
from tests.slurm.cluster import Cluster, started
from tests.slurm.world import STEPS, WORDS
from tests.tmpfs import mounted_tmpfs
from tools.data.dataset_writer import DatasetWriter

# Every save stays, so that each can be compared.
KEEP_ALL = "checkpoint.keep=0"
# Size of a lane's file system: two runs with all their checkpoints and orders of samples fit.
DISK = "600m"
MANY = "many"


@dataclass(frozen=True)
class Row:
    """A blow and what came of its run. `result`: survived or lost; `why`: of a loss. `standby`: the next attempt took the Slurm
    step that waited for it.
    """

    where: str
    seed: int
    in_place: bool
    way: str
    moment: str
    step: int
    attempt: int
    seconds: float
    result: str
    why: str = ""
    standby: bool = False


def run_case(case: Case, start: Callable[[], LocalRun | SlurmRun], check: Callable[[], None]) -> list[Row]:
    """All blows of a case that came before its end, then its end and its check. What fails there loses them all."""
    struck: list[Struck] = []
    pending, why = "", ""
    run = start()
    try:
        with suppress(Missed):
            for blow in case.blows:
                pending = blow.way
                struck += run.strike(blow)
                pending = ""
        run.finish()
        check()
    except (AssertionError, DamagedFile, OSError, subprocess.SubprocessError):
        why = traceback.format_exc()[-6000:]
        struck += [Struck(pending, "?", 0, 0, 0.0)] if pending or not struck else []
    finally:
        run.end()
    result, warm = "lost" if why else "survived", run.warm_attempts()
    place = (case.where, case.seed, case.in_place)
    return [
        Row(*place, one.way, one.moment, one.step, one.attempt, round(one.seconds, 1), result, why, one.attempt + 1 in warm)
        for one in struck
    ]


class Lane:
    """The cases of one place, one after the other, on a file system of their own that can be filled. A context manager."""

    def __init__(self, where: str, folder: Path, lost: Path) -> None:
        self.where, self.folder, self.disk, self.lost = where, folder / where, folder / where / "disk", lost
        self.cluster: Cluster | None = None

    def __enter__(self) -> Lane:
        self.folder.mkdir()
        with ExitStack() as stack:
            # Mounted before the nodes start, since each node copies the mounts of its start.
            stack.enter_context(mounted_tmpfs(self.disk, DISK))
            self.config = write_config(self.folder / "small.yaml", self.folder.parent)
            undisturbed = launch(self.config, self.folder / "undisturbed", *self.words)
            assert undisturbed.end() == 0, undisturbed.errors
            if self.where == SLURM:
                self.cluster = stack.enter_context(started(Cluster(self.folder / "cluster")))
                # Slurm's commands, and those of ours that call them, are this process's children.
                os.environ["SLURM_CONF"] = self.cluster.env["SLURM_CONF"]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def words(self) -> list[str]:
        return [*WORDS, KEEP_ALL, f"data.train=[{{path: {self.folder.parent / MANY}}}]"]

    def run(self, case: Case) -> list[Row]:
        """The folder of a lost run is kept in `lost`."""
        run_dir = self.disk / f"{self.where}_{case.seed}"
        # Each run builds the orders of its samples anew.
        words = [*self.words, f"data.cache_dir={run_dir}_orders"]

        def start() -> LocalRun | SlurmRun:
            if self.cluster is None:
                return LocalRun(case, self.config, run_dir, STEPS, *words)
            return SlurmRun(case, self.cluster, self.config, run_dir, STEPS, *words)

        rows = run_case(case, start, lambda: check_run(run_dir, self.folder / "undisturbed", STEPS))
        if self.cluster is not None:
            self.cluster.restore()
        if any(row.result == "lost" for row in rows):
            shutil.copytree(run_dir, self.lost / run_dir.name, dirs_exist_ok=True)
        for path in self.disk.iterdir():
            shutil.rmtree(path)
        return rows


def make_data(folder: Path) -> None:
    """The small corpus, and MANY: the same tokens in so many documents that the ranks share the order of samples in a file."""
    make_corpus(folder)
    tokens = np.fromfile(folder / "embedded.bin", token_dtype(700))
    times = CACHED_ENTRIES // len(tokens) + 1
    with DatasetWriter(str(folder / MANY), tokens.dtype) as writer:
        for _ in range(times):
            writer.add(tokens.tobytes(), np.ones(len(tokens), np.int32).tobytes())
        meta = json.loads((folder / "embedded.meta.json").read_text())
        writer.finish(meta | dict.fromkeys(("num_documents", "num_tokens"), times * len(tokens)))
