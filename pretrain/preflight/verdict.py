"""The answer whether a run may start, shared by `check`, `launch`, `resume` and the ranks.

In: a config. Out: every problem with its fix, notices, and the step at which the run would continue. `preflight` checks what a
login node can see. `rank_problems` runs on a started rank and also checks what its machines lack.

Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError, Notice, Problem
from configs.fields import check_keys
from configs.load import Loaded, read_config
from configs.schema import Config
from parallel.compat.supported import engine_problems
from parallel.layout import Layout
from parallel.legality.verdict import check_config, derive_layout
from pretrain.data.tokenizer import load_tokenizer, vocab_size
from pretrain.model.backend import check_backend, detect_machine
from pretrain.preflight.data import check_data, repetition_notices, source_plan
from pretrain.preflight.disk_space import check_disk_space
from pretrain.preflight.memory import memory_verdict
from pretrain.preflight.nvme import check_nvme
from pretrain.preflight.resume import ResumePoint, check_warm_start, find_resume_point
from pretrain.preflight.world import check_device, check_world, computes_on_cpu
from pretrain.run.folder import folder_of

# The sections that `check_data` reads.
READ_BY_DATA = ("data", "batch", "run", "model.vocab")


@dataclass(frozen=True)
class Preflight:
    """The answer. `layout`: None when the degrees are illegal. `resume`: None when the run would start at step 0.

    `sources`: tokens and epochs of the training data (`source_plan`); None where its files were not looked at, or with problems.
    """

    problems: list[Problem]
    notices: tuple[Notice, ...] = ()
    layout: Layout | None = None
    resume: ResumePoint | None = None
    sources: list[dict[str, Any]] | None = None


def load_to_start(name: str, overrides: Sequence[str], with_data: bool) -> Loaded:
    """The config of a run. Raises ConfigError: what can't be read, and what is wrong with the rest, all at once.

    `with_data`: this machine has the data's files.
    """
    reading = read_config(name, overrides)
    if not reading.problems:
        return reading.loaded
    config = reading.loaded.config
    problems = [*reading.problems, *check_config(config, reading.doubtful).problems]
    bad = [*reading.doubtful, *(problem.path for problem in problems)]
    if with_data and not any(path.startswith(READ_BY_DATA) for path in bad):
        problems += check_data(config)
    raise ConfigError(problems)


def preflight(config: Config, with_data: bool) -> Preflight:
    """Everything that is known before a start. `with_data`: this machine has the data's files and the run folder's disk."""
    problems, notices, sources = _examine(config, with_data)
    layout, resume = derive_layout(config), None
    if layout and not problems:
        resume, problems, damaged = find_resume_point(config, layout, known_vocab_size(config))
        notices = (*notices, *damaged)
        if with_data and resume is None and config.checkpoint.load is not None and not problems:
            tokenizer = load_tokenizer(config.data.tokenizer)
            problems = check_warm_start(config, vocab_size(config, tokenizer), tokenizer)
    return Preflight(problems, notices, layout, resume, None if problems else sources)


def _examine(config: Config, with_data: bool) -> tuple[list[Problem], tuple[Notice, ...], list[dict[str, Any]] | None]:
    """(problems, notices, sources) of the config, its files and its memory."""
    verdict = check_config(config)
    problems, sources = [*verdict.problems, *engine_problems(config)], None
    # The check of the files uses lengths and weights of the config, so those must have the right types first.
    if with_data and not any(problem.path.startswith(READ_BY_DATA) for problem in check_keys(config)):
        problems += check_data(config)
        sources = None if problems else source_plan(config)
    tokens = known_vocab_size(config)
    if verdict.ok and computes_on_cpu(config, os.environ):
        problems += check_backend(config, detect_machine(cuda=False))
    if verdict.ok and config.launch.target == "local":
        problems += check_nvme(config)
        if with_data and tokens is not None:
            problems += check_disk_space(config, tokens, folder_of(config))
    if not verdict.ok:
        return problems, verdict.notices, sources
    too_large, tight = memory_verdict(config, tokens)
    return problems + too_large, (*verdict.notices, *tight, *repetition_notices(config, sources or ())), sources


def known_vocab_size(config: Config) -> int | None:
    """The vocabulary size in tokens. None: the config doesn't state it, and its tokenizer can't be read."""
    try:
        return vocab_size(config)
    except ConfigError:
        return None


def machine_problems(config: Config, device_type: str) -> list[Problem]:
    """Problems of this machine with the config. `device_type`: cpu or cuda, the device that the process found."""
    problems = check_device(config.cluster.device, device_type)
    return [*problems, *check_backend(config, detect_machine(device_type == "cuda")), *check_nvme(config)]


def rank_problems(config: Config, lacking: Sequence[Problem], environ: Mapping[str, str] = os.environ) -> list[Problem]:
    """Every problem that is known before the first process group is made. `lacking`: `machine_problems` of all machines.

    A run that goes on trains also where no checkpoint fits on the disk: someone may make room before the next save.
    """
    problems = [*check_world(environ, config), *lacking, *check_config(config).problems, *check_data(config)]
    folder = folder_of(config)
    return problems or ([] if folder.last_attempt() else check_disk_space(config, vocab_size(config), folder))
