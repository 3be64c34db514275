"""The `phalanx` command: names a command's module, imports only that one, and turns bad input into exit 2.

In: the words of the command line. Out: an exit code: 0 fine, 2 bad input, 1 broke, 130 interrupted.

Torch-free.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from configs import __version__
from configs.errors import ConfigError, Problem, json_problem, report
from pretrain.run.files import storage_problem
from pretrain.run.process import open_standard_streams, print_in_any_locale
from pretrain.run.provenance import package_version
from tools.ladder.names import is_ladder, positional


@dataclass(frozen=True)
class Command:
    """A command's module, whose `main(argv) -> exit code` runs it. `with_name`: argv[0] is the command's own name.

    `of_ladder`: the module that runs the command where its first word names a ladder; argv[0] is the command's name there too.
    """

    module: str
    summary: str
    with_name: bool = False
    of_ladder: str | None = None


LADDER = "tools.ladder.cli"
GROUPS: dict[str, dict[str, Command]] = {
    "before a run": {
        "data": Command("tools.data.cli", "tokenizers and token files; the documents behind a step of a run"),
        "check": Command("tools.check", "the verdict on a config: every problem with its fix, warnings, the layout"),
        "rehearse": Command("tools.rehearse.cli", "train a small model in the layout on CPUs, and compare with one process"),
        "plan": Command("tools.plan", "memory, time, MFU, days and cost; --search: the best layouts", True, LADDER),
        "plan-validate": Command("tools.plan", "errors of the planner's predictions for published runs", with_name=True),
        "doctor": Command("launch.doctor.cli", "whether this machine, or each node of a Slurm job, is fit to train"),
        "model": Command("tools.model", "parameters, FLOPs a token and weight bytes of a preset, config or config.json"),
    },
    "a run": {
        "launch": Command(
            "launch.commands", "start a run or a ladder of runs (--dry-run prints the exact command)", True, LADDER
        ),
        "status": Command("launch.commands", "state, step, loss and speed of a run, a ladder or all runs", True, LADDER),
        "logs": Command("launch.commands", "the run's logs, the first error first", with_name=True),
        "cancel": Command("launch.commands", "stop a live run after a save", with_name=True),
        "resume": Command("launch.commands", "continue a run from its newest checkpoint", with_name=True),
        "report": Command(
            "tools.report.cli", "write runs or a ladder as one HTML page: curves, experts, attempts, layout, config"
        ),
        "wandb": Command("launch.send_to_wandb", "send W&B the steps that it lacks of a run"),
    },
    "after a run": {
        "generate": Command("tools.inference.cli", "text from a checkpoint", with_name=True),
        "evaluate": Command("tools.inference.cli", "loss and perplexity of a checkpoint, or its scores on tasks", with_name=True),
        "convert": Command("tools.convert.cli", "checkpoints from and to Hugging Face, checked tensor by tensor and by logits"),
    },
    "the tools themselves": {
        "bench": Command("tools.bench.cli", "measurements: a step, a save, tokenising, conversion, a search, a start"),
        "completion": Command("tools.completion", "the script that completes commands in bash or zsh"),
    },
}
VERSIONED = ("torch", "megatron-core", "deepspeed", "transformers", "wandb", "omegaconf")
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def help_text() -> str:
    """What `phalanx --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: phalanx COMMAND ...",
        "",
        "Plans, rehearses and launches the pretraining of Mixture-of-Experts transformers, and converts their checkpoints.",
    ]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"] + [f"  {name:<{width}}  {command.summary}" for name, command in group.items()]
    lines += [
        "",
        "CONFIG is a YAML file or the name of a shipped one; any key can be set behind it: section.key=value.",
        "",
        "examples:",
        "  phalanx check quickstart parallel.tensor=2 launch.processes_per_node=8",
        "  phalanx launch quickstart run.steps=100 optimizer.lr=1e-3",
        "",
        "`phalanx COMMAND --help` lists options; `phalanx --version` lists versions. Exit codes: 0 fine, 2 bad input, 1 broke.",
    ]
    return "\n".join(lines)


def version_text() -> str:
    """Our version, Python's, and those of the libraries that decide a run's numbers; none of them is imported."""
    lines = [("phalanx", __version__), ("python", platform.python_version())]
    lines += [(name, package_version(name) or "not installed") for name in VERSIONED]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}} {version}" for name, version in lines)


def _unknown(name: str) -> int:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else "commands are " + ", ".join(COMMANDS)
    print(f"phalanx: no command {name!r}; {hint}", file=sys.stderr)
    return 2


def run(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name) and give its exit code."""
    if argv and argv[0] in ("-V", "--version", "version"):
        print(version_text())
        return 0
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    name, rest = argv[0], list(argv[1:])
    if name not in COMMANDS:
        return _unknown(name)
    command = COMMANDS[name]
    try:
        if command.of_ladder and is_ladder(next(positional(rest), "")):
            return int(importlib.import_module(command.of_ladder).main([name, *rest]))
        module = importlib.import_module(command.module)
        return int(module.main([name, *rest] if command.with_name else rest))
    except ConfigError as error:
        return _refuse(error.problems, "--json" in rest)
    except PermissionError as error:
        # Any file that a command names, lists or opens may be another user's.
        return _refuse([storage_problem(name, error.filename or "a file", error)], "--json" in rest)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        problem = Problem("path", str(error.filename), "is longer than any file's name or path on this system", "shorten it")
        return _refuse([problem], "--json" in rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _refuse(problems: Sequence[Problem], as_document: bool) -> int:
    if as_document:
        print(json.dumps({"ok": False, "problems": [json_problem(problem) for problem in problems]}))
    print(report(problems), file=sys.stderr)
    return 2


def main() -> None:
    """The console script."""
    open_standard_streams()
    print_in_any_locale()
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain at exit when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
