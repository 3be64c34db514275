"""A ladder's file. In: a YAML file with a section `ladder`, or the folder of a launched ladder. Out: a `Ladder`.

    ladder:
      base: quickstart            # a config file, or the name of a shipped one
      dir: runs/sizes             # the runs' folders lie here; default runs/NAME
      max_running: 2              # Slurm jobs that run at the same time; default 4
      points:                     # values that go together
        - {name: small, model.hidden_size: 128}
        - {name: large, model.hidden_size: 256}
      grid:                       # every combination, of every point
        optimizer.lr: [1e-3, 3e-3]

Torch-free.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import Loaded, load_config
from configs.sources import SHIPPED, find_file, override_values, parse_yaml
from pretrain.run.files import storage_problem, write_json
from tools.ladder.names import RESOLVED

MAX_POINTS = 10_000
MAX_RUNNING = 4
_KEYS = ("base", "dir", "max_running", "points", "grid")


@dataclass(frozen=True)
class Point:
    """One run of a ladder: its name in the ladder, and the key=value words that make it from the ladder's base."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Ladder:
    """`base` is a config's path or shipped name. `folder` holds one run folder for each point."""

    name: str
    base: str
    folder: Path
    max_running: int
    points: tuple[Point, ...]

    def run_dir(self, point: Point) -> Path:
        """The run folder of a point."""
        return self.folder / point.name

    def words_of(self, point: Point) -> list[str]:
        """The words of a point, with its run folder, its name and the W&B group. A point may name another group itself."""
        own = [f"run.dir={self.run_dir(point)}", f"run.name={self.name}-{point.name}"]
        return [f"metrics.wandb.group={self.name}", *point.words, *own]

    def with_words(self, words: Sequence[str]) -> Ladder:
        """The ladder whose every point has these words too; they win over the file's."""
        return replace(self, points=tuple(Point(point.name, (*point.words, *words)) for point in self.points))

    def load(self) -> list[tuple[Point, Loaded]]:
        """The config of each point. Raises ConfigError with the problems of all of them."""
        problems, loaded = [], []
        for point in self.points:
            if taken := [word for word in point.words if word.partition("=")[0] in ("run.dir", "run.name")]:
                rule = "a ladder gives each run its folder and its name"
                problems += named(point, [Problem("run", taken[0], rule, "leave it out; ladder.dir says where the folders lie")])
            try:
                loaded.append((point, load_config(self.base, self.words_of(point))))
            except ConfigError as error:
                problems += named(point, error.problems)
        if problems:
            raise ConfigError(merged(problems))
        return loaded

    def write(self) -> None:
        """Write the points into the ladder's folder. Raises ConfigError if it can't be written."""
        points = [{"name": point.name, "words": list(point.words)} for point in self.points]
        document = {"ladder": self.name, "base": self.base, "max_running": self.max_running, "points": points}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RESOLVED, document)
        except OSError as error:
            raise ConfigError(storage_problem("ladder.dir", self.folder, error)) from error


def named(point: Point, problems: Sequence[Problem]) -> list[Problem]:
    """The problems of one point, with its name before the key path."""
    return [Problem(f"{point.name}: {problem.path}", problem.got, problem.rule, problem.fix) for problem in problems]


def merged(problems: Sequence[Problem]) -> list[Problem]:
    """Problems that many points share are told once, with the number of points."""
    groups: dict[tuple[str, str, str, str], list[Problem]] = {}
    for problem in problems:
        path = problem.path.partition(": ")[2]
        groups.setdefault((path, repr(problem.got), problem.rule, problem.fix), []).append(problem)
    told = []
    for found in groups.values():
        first = found[0]
        point, _, path = first.path.partition(": ")
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        told.append(Problem(f"{point}{more}: {path}", first.got, first.rule, first.fix))
    return told


def read_ladder(name: str) -> Ladder:
    """The ladder of a file or folder that `is_ladder` knows. Raises ConfigError with every problem of its own keys."""
    path = Path(name)
    try:
        if path.is_dir():
            return _resolved(path)
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(storage_problem("LADDER", path, error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(Problem(name, f"byte {error.start}", "must be UTF-8 text", "save the file as UTF-8")) from error
    tree, texts, problems = parse_yaml(text, name)
    if problems:
        raise ConfigError(problems)
    return _Reader(path, tree, texts).read()


def _resolved(folder: Path) -> Ladder:
    path = folder / RESOLVED
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        points = tuple(Point(str(point["name"]), tuple(map(str, point["words"]))) for point in found["points"])
        return Ladder(str(found["ladder"]), str(found["base"]), folder, int(found["max_running"]), points)
    except (ValueError, KeyError, TypeError) as error:
        fix = "launch the ladder's YAML file again: what has finished is not run twice"
        raise ConfigError(Problem(str(path), str(error), "must be what phalanx launch wrote", fix)) from error


class _Reader:
    """Reads the section `ladder` of a file and collects its problems."""

    def __init__(self, path: Path, tree: dict[Any, Any], texts: Any) -> None:
        self.path = path
        self.problems: list[Problem] = []
        section, written = tree.get("ladder"), texts.get("ladder")
        self.tree: dict[Any, Any] = section if isinstance(section, dict) else {}
        self.texts: dict[Any, Any] = written if isinstance(written, dict) else {}
        if not isinstance(section, dict):
            fix = "ladder: with base, and points or grid, below it"
            self._problem("", type(section).__name__, "ladder must be a mapping", fix)
        if others := [name for name in tree if name != "ladder"]:
            fix = "put the values of a run into the base, or into points and grid"
            self._problem("", others, "a ladder's file has the section `ladder` and nothing else", fix)

    def _problem(self, key: str, got: object, rule: str, fix: str) -> None:
        where = f"{self.path}: ladder{'.' if key and key[0] != '[' else ''}{key}" if key else str(self.path)
        self.problems.append(Problem(where, got, rule, fix))

    def read(self) -> Ladder:
        """The ladder. Raises ConfigError with every problem."""
        if self.problems:
            raise ConfigError(self.problems)
        for key in self.tree:
            if key not in _KEYS:
                self._problem(str(key), self.tree[key], f"a ladder has {', '.join(_KEYS)}", "remove the key, or correct its name")
        ladder = Ladder(self.path.stem, self._base(), self._folder(), self._max_running(), tuple(self._points()))
        if self.problems:
            raise ConfigError(self.problems)
        return ladder

    def _base(self) -> str:
        base = self.tree.get("base")
        if not isinstance(base, str):
            self._problem("base", base, "must be a config's path or the name of a shipped one", "base: quickstart")
            return ""
        # As a `base:` of a config: relative to the file. A shipped name stays a name.
        found = find_file(base, self.path.parent)
        return str(found.resolve()) if found and not found.is_relative_to(SHIPPED) else base

    def _folder(self) -> Path:
        folder = self.tree.get("dir", f"runs/{self.path.stem}")
        if not isinstance(folder, str) or not folder:
            self._problem("dir", folder, "must be a folder's path", f"dir: runs/{self.path.stem}")
            folder = "."
        return Path(folder)

    def _max_running(self) -> int:
        value = self.tree.get("max_running", MAX_RUNNING)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self._problem("max_running", value, "must be a whole number of at least 1", f"max_running: {MAX_RUNNING}")
            return 1
        return value

    def _points(self) -> list[Point]:
        listed, axes = self._listed(), self._axes()
        if not listed and not axes:
            self._problem("points", None, "a ladder has points, or a grid, or both", "grid: {optimizer.lr: [1e-3, 3e-3]}")
        sizes = [len(axis) for axis in axes]
        number = max(1, len(listed))
        for size in sizes:
            number *= size
        if number > MAX_POINTS:
            self._problem("grid", number, f"at most {MAX_POINTS:,} points", "take values out")
            return []
        made = [
            Point("-".join(filter(None, (name, *(label for label, _ in chosen)))), (*words, *(word for _, word in chosen)))
            for name, words in (listed or [("", ())])
            for chosen in product(*axes)
        ]
        twice = [name for name, times in Counter(point.name for point in made).items() if times > 1]
        if twice:
            self._problem("points", twice[:5], "each point has a name of its own", "give the points names: {name: small, …}")
        return made

    def _listed(self) -> list[tuple[str, tuple[str, ...]]]:
        points, texts = self.tree.get("points", []), self.texts.get("points", [])
        if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
            self._problem("points", points, "must be a list of mappings", "points: [{name: small, model.hidden_size: 128}]")
            return []
        found = []
        for index, (point, written) in enumerate(zip(points, texts)):
            words = [self._word(f"points[{index}].{key}", key, point[key], written[key]) for key in point if key != "name"]
            name = written.get("name") or "-".join(_label(word) for word in words)
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", str(name)):
                rule = "a point's name is its folder's: letters, digits and . _ + -"
                self._problem(f"points[{index}].name", name, rule, "name: small")
            found.append((str(name), tuple(words)))
        return found

    def _axes(self) -> list[list[tuple[str, str]]]:
        grid, texts = self.tree.get("grid", {}), self.texts.get("grid", {})
        if not isinstance(grid, dict):
            self._problem("grid", grid, "must be a mapping of keys to lists", "grid: {optimizer.lr: [1e-3, 3e-3]}")
            return []
        axes = []
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                self._problem(f"grid.{key}", values, "must be a list of at least one value", f"{key}: [{values}]")
                continue
            words = [self._word(f"grid.{key}[{index}]", key, value, texts[key][index]) for index, value in enumerate(values)]
            axes.append([(_label(word), word) for word in words])
        return axes

    def _word(self, where: str, key: Any, value: Any, written: Any) -> str:
        """The key=value word of one value. Numbers stay as they were written."""
        plain = isinstance(written, str) and not isinstance(value, str)
        word = f"{key}={written if plain else json.dumps(value)}"
        for problem in override_values([word])[1]:
            self._problem(where, problem.got, problem.rule, problem.fix)
        return word


def _label(word: str) -> str:
    """The part of a point's name that stands for one value: optimizer.lr=1e-3 → lr1e-3."""
    key, _, value = word.partition("=")
    return key.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9._+-]+", "_", value).strip("_")
