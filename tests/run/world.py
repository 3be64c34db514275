"""A real run by the user's commands: `phalanx launch`, torchrun, pretrain/main.py, 2 ranks, W&B offline."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs.load import to_yaml
from configs.schema import BlendPart
from launch.watch.processes import STANDBY, name_of, ranks_of
from pretrain.run.beat import Beat, decode
from pretrain.run.files import iterate_lines
from pretrain.run.folder import RunFolder
from tests.pretrain.world import small_config
from tests.wandb_read import offline_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def write_config(path: Path, data: Path) -> Path:
    """12 steps of a small MoE on pipeline 2, a checkpoint every second step."""
    config = small_config(model__vocab_size=None, schedule__warmup_steps=1)
    config.data.tokenizer.path = str(data / "tok.model")
    config.data.train = [BlendPart(str(data / "embedded"))]
    config.batch.global_batch_seqs, config.batch.seq_length_tokens = 8, 32
    config.run.steps, config.run.eval_batches = STEPS, 1
    config.parallel.pipeline = 2
    config.launch.processes_per_node = 2
    config.checkpoint.interval_steps = 2
    path.write_text(to_yaml(config))
    return path


@dataclass
class Command:
    """A running `phalanx launch`."""

    process: subprocess.Popen[str]
    folder: RunFolder

    def end(self, timeout_s: float = 240) -> int:
        self.output, self.errors = self.process.communicate(timeout=timeout_s)
        return self.process.returncode

    def agent(self) -> psutil.Process | None:
        """torchrun's process. None: it has ended."""
        try:
            below = psutil.Process(self.process.pid).children()
            return next((one for one in below if "launch.torchrun" in one.cmdline() and one.name() != STANDBY), None)
        except psutil.NoSuchProcess:
            return None

    def ranks(self) -> list[psutil.Process]:
        """The rank processes that have named themselves, by rank."""
        agent = self.agent()
        pids = ranks_of(agent.pid) if agent is not None else []
        found = {name_of(pid): psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)}
        return [process for name, process in sorted(found.items()) if name.startswith("rank ")]

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while last_step(self.folder) < step:
            assert self.process.poll() is None, f"ended early: {self.process.communicate()}"
            assert time.monotonic() < deadline, f"step {step} did not come"
            time.sleep(0.01)


def attempt_of(rank: psutil.Process) -> int:
    """The attempt whose log a rank writes; 0: none. /proc shows the environment that its torchrun was started with, before there
    was an attempt if it was a standby. Raises OSError if the rank has ended.
    """
    number = Path(os.readlink(f"/proc/{rank.pid}/fd/1")).parent.name.removeprefix("attempt_")
    return int(number) if number.isdecimal() else 0


def beat_of(rank: psutil.Process) -> Beat | None:
    """A rank's heartbeat, wherever it lies. None: it has none yet, or the rank has ended."""
    with suppress(OSError):
        for opened in Path(f"/proc/{rank.pid}/fd").iterdir():
            if os.readlink(opened).endswith(".beat"):
                return decode(opened.read_bytes())
    return None


def launch(config: Path, run_dir: Path, *words: str) -> Command:
    """`phalanx launch CONFIG run.dir=… words`, in a process of its own."""
    command = [sys.executable, "-m", "tools.cli", "launch", str(config), f"run.dir={run_dir}", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    process = subprocess.Popen(command, env=env, cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return Command(process, RunFolder(run_dir))


def last_step(folder: RunFolder) -> int:
    rows = [row for _, row in iterate_lines(folder.metrics) if row] if folder.metrics.exists() else []
    return rows[-1]["step"] if rows else 0


def check_equal(run: Path, undisturbed: Path, steps: int = STEPS, logged: list[int] | None = None) -> None:
    """The same weights and optimizer state bit for bit; each step once in the record and in W&B; the same losses.

    `logged`: the steps that a W&B server got; None: as the offline files have it.
    """
    names = sorted(path.name for path in (undisturbed / "checkpoints" / f"step_{steps:07d}").glob("*.safetensors"))
    assert names
    for name in names:
        parts = [folder / "checkpoints" / f"step_{steps:07d}" / name for folder in (run, undisturbed)]
        assert filecmp.cmp(*parts, shallow=False), f"{name} differs"
    rows = [
        {row["step"]: row["loss"] for _, row in iterate_lines(folder / "metrics.jsonl") if row} for folder in (run, undisturbed)
    ]
    assert rows[0] == rows[1]
    assert sorted(rows[0]) == list(range(1, steps + 1))
    if logged is None:
        logged = sorted(offline_steps(run, (run / "wandb_id").read_text().strip()))
    assert logged == list(range(1, steps + 1)), "each step once in W&B"
