"""A rank for the launcher's tests, without torch: opens the attempt, writes rows, obeys signals, fails as told.

Arguments: --config FILE key=value … (as pretrain/main.py takes them). RANK_PLAN in the environment, as JSON:
{"steps": 5, "pause_s": 0.05, "raise": {"2": 3}, "kill": {"1": 2}, "refuse": true, "ignore_signals": false,
 "hang": {"0": 2}, "linger": {"1": true}, "chatter": 4000, "console": true, "last_words": "…"}: linger stands still once
 all steps are done; chatter prints that many characters a step; console prints steps as the console does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import load_config
from pretrain.rank.process_setup import prepare, run_rank
from pretrain.rank.stop_signals import StopSignals
from pretrain.run.attempt import Attempt, open_attempt
from pretrain.run.beat import COMPUTING, RECORDING, WAITING
from pretrain.run.folder import Outcome, folder_of
from pretrain.run.heartbeat import Heartbeat
from pretrain.run.provenance import make_provenance
from pretrain.run.record import Record

RANK = int(os.environ["RANK"])
# A rank that raises beside one that is killed does so once the other is gone, as partners do.
KILLED = Path(os.environ.get("PHALANX_LOG_DIR", ".")) / "killed"


def wait_for_ever() -> None:
    threading.Event().wait()


def train(plan: dict[str, Any], signals: StopSignals, attempt: Attempt | None, record: Record | None) -> tuple[str, int]:
    """(state, last step)."""
    for step in range(1, plan["steps"] + 1):
        signals.beat.enter(WAITING, step)
        signals.beat.enter(COMPUTING)
        if plan.get("raise", {}).get(str(RANK)) == step:
            while plan.get("kill") and not KILLED.exists():
                time.sleep(0.01)
            raise ValueError(f"rank {RANK} can't go on")
        if plan.get("kill", {}).get(str(RANK)) == step:
            KILLED.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.get("hang", {}).get(str(RANK)) == step:
            wait_for_ever()
        signals.beat.enter(RECORDING)
        if record is not None:
            record.append({"step": step, "loss": 5.0 / step, "grad_norm": 1.0, "tokens": step, "step_time_s": plan["pause_s"]})
            if plan.get("console"):
                print(f"step {step}/{plan['steps']}  loss 1", flush=True)
            else:
                print(f"step {step}", flush=True)
            if plan.get("chatter"):
                print("." * plan["chatter"], flush=True)
        time.sleep(plan["pause_s"])
        if signals.requested and not plan.get("ignore_signals"):
            return signals.state, step
    return "finished", plan["steps"]


def body() -> int:
    signals = StopSignals(repeat_s=0.5 if os.environ.get("SHORT_REPEAT") else 5.0, beat=Heartbeat(os.environ)).install()
    signals.beat.start()
    words = sys.argv[sys.argv.index("--config") + 1 :]
    plan = {"steps": 3, "pause_s": 0.02, **json.loads(os.environ.get("RANK_PLAN", "{}"))}
    loaded = load_config(words[0], words[1:])
    if plan.get("refuse"):
        raise ConfigError(Problem("data.train", [], "there must be something to learn from", "name a file"))
    if RANK != 0:
        train(plan, signals, None, None)
        if plan.get("linger", {}).get(str(RANK)):
            wait_for_ever()
        signals.beat.end()
        return 0
    with open_attempt(folder_of(loaded.config), loaded.text, make_provenance(loaded.origin), os.environ) as attempt:
        record = Record.open(attempt.folder.metrics, 0, attempt.event, attempt.own_dir / "metrics_cut.jsonl")
        state, step = train(plan, signals, attempt, record)
        signals.beat.end()
        record.close()
        attempt.finish(Outcome(attempt.number, state, signals.signal_name or "all steps done", step, step))
        if "last_words" in plan:
            print(f"{state} at step {step}: all steps done\n{plan['last_words']}", flush=True)
    return 0


if __name__ == "__main__":
    prepare()
    sys.exit(run_rank(body))
