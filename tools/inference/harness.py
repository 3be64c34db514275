"""A checkpoint on the tasks of lm-evaluation-harness, through an export that transformers loads.

In: a run folder, a checkpoint or a Hugging Face folder, and tasks. Out: their scores; those of a run's checkpoint also stand in
its evaluations.jsonl. Nothing is fetched unless the harness is online and the task needs it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from configs.errors import ConfigError, Problem
from pretrain.run.evaluations import append_evaluation
from pretrain.run.files import storage_problem
from pretrain.run.folder import RunFolder
from tools.convert.checkpoints import find_checkpoint, open_manifest
from tools.convert.exporting import export_model
from tools.convert.output_folder import WorkShare
from tools.inference.generate_exported import load_exported


@dataclass(frozen=True)
class Request:
    """What is asked. `include_path`: a folder with YAML files of own tasks. `limit`: documents of each task, None: all.

    `device`: cpu in fp32, or cuda in bf16.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 1
    device: str = "cpu"


def evaluate_tasks(path: Path, request: Request, tokenizer: str | None = None) -> dict[str, Any]:
    """{"checkpoint", "step", "scores": {"TASK/METRIC": value}, "stderr", …}. Raises ConfigError."""
    if (path / "config.json").is_file():
        return {"checkpoint": str(path), "step": None} | _scores(path, request)
    checkpoint = find_checkpoint(path)
    step = open_manifest(checkpoint).step
    with _exported(checkpoint, tokenizer) as folder:
        found = {"checkpoint": str(checkpoint), "step": step} | _scores(folder, request)
    run = RunFolder(checkpoint.parent.parent)
    if checkpoint.parent.name == "checkpoints" and run.events.exists():
        try:
            append_evaluation(run, {"time": time.time()} | found)
        except OSError as error:
            raise ConfigError(storage_problem("RUN_DIR", run.evaluations, error)) from error
    return found


@contextmanager
def _exported(checkpoint: Path, tokenizer: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="phalanx_export_") as made:
        folder = Path(made) / "huggingface"
        export_model(checkpoint, folder, "keep", WorkShare(), 1, False, None, tokenizer)
        yield folder


def _scores(folder: Path, request: Request) -> dict[str, Any]:
    manager = TaskManager(include_path=request.include_path)
    _check_tasks(manager, request.tasks)
    tokenizer, model = load_exported(folder)
    if request.device == "cuda":
        model = model.to("cuda", torch.bfloat16)
    # lm_eval's decorators hide the parameters from type checkers.
    make_model: Any = HFLM
    simple_evaluate: Any = lm_eval.simple_evaluate
    harness = make_model(pretrained=model, tokenizer=tokenizer, batch_size=request.batch_size, device=request.device)
    result: dict[str, Any] = simple_evaluate(
        model=harness,
        tasks=list(request.tasks),
        task_manager=manager,
        num_fewshot=request.num_fewshot,
        limit=request.limit,
        log_samples=False,
    )
    scores, errors = _numbers(result["results"])
    return {
        "scores": scores,
        "stderr": errors,
        "documents": {task: found["effective"] for task, found in result["n-samples"].items()},
        "num_fewshot": result["n-shot"],
        "task_versions": result["versions"],
        "lm_eval": lm_eval.__version__,
    }


def _check_tasks(manager: TaskManager, tasks: Sequence[str]) -> None:
    """Raises ConfigError with every task that the harness doesn't know."""
    known = set(manager.all_tasks)
    rule = "must be a task of lm-evaluation-harness"
    fix = "lm-eval ls tasks lists them; --include-path DIR adds YAML files of your own"
    if problems := [Problem("--tasks", task, rule, fix) for task in tasks if task not in known]:
        raise ConfigError(problems)


def _numbers(results: dict[str, dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """(scores, standard errors), each TASK/METRIC → value. The harness writes METRIC,FILTER and METRIC_stderr,FILTER."""
    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    for task, found in results.items():
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            name = f"{task}/{metric.removesuffix('_stderr')}{'' if filtered == 'none' else '_' + filtered}"
            (errors if metric.endswith("_stderr") else scores)[name] = float(value)
    return scores, errors
