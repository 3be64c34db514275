"""Another interpreter's libraries, as a process that trains the layouts of a rehearsal on request.

In: the path of a Python, configs. Out: what its ranks computed. The process runs this installation's code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import to_yaml
from configs.own_packages import command
from configs.schema import Config
from parallel.layout import make_layout
from tools.rehearse.library_side import LibrarySide, side_of
from tools.rehearse.local_ranks import RankFailed
from tools.rehearse.result_files import load_results
from tools.rehearse.train_rank import RankResult

_FIX = "name the python of a virtual environment that has torch, megatron-core and deepspeed, e.g. .venv-newest/bin/python"
# Lines of the process's stderr that a message shows.
_SHOWN_LINES = 20


class OtherInterpreter:
    """A context manager. `side` tells what the interpreter runs. Raises ConfigError when it does not start."""

    def __init__(self, python: str) -> None:
        self._python = python
        found = shutil.which(python)
        if found is None:
            raise ConfigError(Problem("--against", python, "must be a Python interpreter that can be started", _FIX))
        # Not resolved: a virtual environment's python is a link, and its own path says which environment it is.
        self._words = command(os.path.abspath(found), "tools.rehearse.other_main")

    def __enter__(self) -> OtherInterpreter:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "stderr"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment()
            )
        try:
            self.side: LibrarySide = side_of(self._answer())
        except RankFailed as error:
            self.__exit__(None, None, None)
            rule = f"must run the rehearsal's code under its own libraries, and ends with: {_exception_of(str(error))}"
            raise ConfigError(Problem("--against", self._python, rule, _FIX)) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def train(self, config: Config, steps: int) -> list[RankResult]:
        """What each rank of the layout computed. Raises RankFailed with the message of the rank or of the process."""
        results = Path(self._folder.name) / "results.npz"
        request = {"config": to_yaml(config), "ranks": make_layout(config).world_size, "steps": steps, "results": str(results)}
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise RankFailed(self._last_words()) from error
        if error := self._answer().get("error"):
            raise RankFailed(error)
        return load_results(results)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RankFailed(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        """What a process that has ended left on stderr."""
        code = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join([f"{self._python} exited with {code}", *lines[-_SHOWN_LINES:]])

    @staticmethod
    def _environment() -> dict[str, str]:
        """Variables that would put this interpreter's own libraries in front of the other's are left out."""
        return {
            name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
        }


def _exception_of(text: str) -> str:
    """The exception at the end of a traceback, in one line: its own lines are the first unindented one from the end and below."""
    lines = text.splitlines()
    first = max((index for index, line in enumerate(lines) if line[:1].strip()), default=0)
    return " ".join(line.strip() for line in lines[first:])
