"""Where values come from: YAML files with their `base:` files, and key=value words. Names and text in, `ConfigSource`s out.

Nothing here knows the schema. Every function collects its problems instead of stopping at the first.

Torch-free.
"""

from __future__ import annotations

import copy
import difflib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import Problem

SHIPPED = Path(__file__).resolve().parent
COMMAND_LINE = "command line"
# Keeps every scalar as text. libyaml's is ten times as fast, where PyYAML was built with it.
_TextLoader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


@dataclass(frozen=True)
class ConfigSource:
    """One layer of values. `tree` is nested plain data; `texts` the same with every scalar as it was written."""

    name: str
    tree: dict[Any, Any]
    texts: Any


def shipped_names() -> list[str]:
    """Names of the shipped configs: runs by their bare name, the rest with their folder (model/NAME, cluster/NAME)."""
    names = [path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.glob("*/*.yaml")]
    return sorted(name.removeprefix("run/") for name in names)


def find_file(name: str, folder: Path) -> Path | None:
    """The file of a path (relative to `folder`, `.yaml` may be left out) or of a shipped name; None when there is none."""
    candidates = [folder / name, SHIPPED / f"{name}.yaml", SHIPPED / "run" / f"{name}.yaml", folder / f"{name}.yaml"]
    return next((path for path in candidates if os.path.isfile(path)), None)


def display_name(path: Path) -> str:
    """A file's name for people and provenance: shipped files from `configs/`, others from the working folder if inside."""
    resolved = path.resolve()
    if resolved.is_relative_to(SHIPPED):
        return resolved.relative_to(SHIPPED.parent).as_posix()
    return resolved.relative_to(Path.cwd()).as_posix() if resolved.is_relative_to(Path.cwd()) else str(resolved)


def _yaml_problem(error: Exception, path: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "not readable"
    if isinstance(error, (yaml.YAMLError, RecursionError)):
        detail = getattr(error, "problem", None) or getattr(error, "reason", None) or "too deeply nested"
        fix = "mend the line; spaces indent, tabs don't, and text with ': ', '#' or a leading sign needs quotes"
        return Problem(path, where, f"must be YAML: {detail}", fix)
    detail = str(error).split("\n")[0]
    return Problem(path, getattr(error, "full_key", None) or where, f"must be readable by OmegaConf: {detail}", "mend the value")


def parse_yaml(text: str, name: str) -> tuple[dict[Any, Any], Any, list[Problem]]:
    """(tree, texts, problems) of a file's YAML mapping. An empty file is an empty mapping."""
    return copy.deepcopy(_parse_once(text, name))


# A process that loads configs on the same bases parses these once: parsing is most of a load.
@lru_cache(maxsize=64)
def _parse_once(text: str, name: str) -> tuple[dict[Any, Any], Any, list[Problem]]:
    try:
        loaded = OmegaConf.load(io.StringIO(text))
        texts = yaml.load(text, Loader=_TextLoader)
    except (yaml.YAMLError, RecursionError, OmegaConfBaseException, OSError) as error:
        return {}, {}, [_yaml_problem(error, name)]
    # OmegaConf reads a lone word as {word: null}; the texts tell the two apart.
    if not isinstance(loaded, DictConfig) or not isinstance(texts, (dict, type(None))):
        fix = "write `section:` with its keys indented below it"
        return {}, {}, [Problem(name, type(texts).__name__, "must be a mapping of keys to values", fix)]
    return cast(dict[Any, Any], OmegaConf.to_container(loaded, resolve=False)), texts or {}, []


def _read_text(path: Path) -> tuple[str, list[Problem]]:
    name = display_name(path)
    try:
        return path.read_bytes().decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        return "", [Problem(name, f"byte {error.start}", "must be UTF-8 text", "save the file as UTF-8")]
    except OSError as error:
        return "", [Problem(name, error.strerror, "must be readable", "check the path and its permissions")]


def _base_names(value: Any, name: str) -> tuple[list[str], list[Problem]]:
    names = [value] if isinstance(value, str) else value
    if names is None:
        return [], []
    if isinstance(names, list) and all(isinstance(item, str) for item in names):
        return names, []
    return [], [Problem(f"{name}: base", value, "must be a config's name or path, or a list of them", "base: [model/tiny_moe]")]


def file_sources(name: str, folder: Path | None = None, chain: tuple[Path, ...] = ()) -> tuple[list[ConfigSource], list[Problem]]:
    """The layers of a config file: its `base:` files first, in order, each with its own bases. `chain`: files being read."""
    path = find_file(name, folder or Path.cwd())
    if path is None:
        asked = f"{display_name(chain[-1])}: base" if chain else "CONFIG"
        close = difflib.get_close_matches(name, shipped_names(), n=1)
        fix = f"did you mean {close[0]}? Otherwise give" if close else "give"
        fix += " the path of a YAML file, or one of: " + ", ".join(shipped_names())
        return [], [Problem(asked, name, "must be a file, or the name of a shipped config", fix)]
    path = path.resolve()
    if path in chain:
        loop = " -> ".join(display_name(part) for part in (*chain[chain.index(path) :], path))
        return [], [
            Problem(f"{display_name(chain[-1])}: base", name, f"files must not be each other's base: {loop}", "remove one")
        ]
    text, problems = _read_text(path)
    if problems:
        return [], problems
    tree, texts, problems = parse_yaml(text, display_name(path))
    bases, base_problems = _base_names(tree.pop("base", None), display_name(path))
    problems += base_problems
    sources = []
    for base in bases:
        more, more_problems = file_sources(base, path.parent, (*chain, path))
        sources += more
        problems += more_problems
    return [*sources, ConfigSource(display_name(path), tree, texts)], problems


def _parse_value(text: str, name: str) -> tuple[Any, Any, list[Problem]]:
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        return cast(dict[str, Any], value)["value"], yaml.load(text, Loader=_TextLoader), []
    except (yaml.YAMLError, RecursionError, OmegaConfBaseException) as error:
        return None, None, [_yaml_problem(error, name)]
    except UnicodeEncodeError:
        # Python reads bytes that are no UTF-8 as lone surrogates.
        return None, None, [Problem(name, text, "must be UTF-8 text", "give the value in UTF-8")]


def override_values(overrides: Sequence[str]) -> tuple[list[tuple[str, Any, Any]], list[Problem]]:
    """(dotted key, value, value as written) of each key=value word. `a[0].b` and `a.0.b` name a list's item alike."""
    found, problems = [], []
    for word in overrides:
        name, equals, text = word.partition("=")
        name = re.sub(r"\[(\d+)\]", r".\1", name.strip())
        if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", name):
            problems.append(Problem(COMMAND_LINE, word, "overrides are written key=value", "for example optimizer.lr=1e-4"))
            continue
        value, as_written, value_problems = _parse_value(text, name)
        problems += value_problems
        if not value_problems:
            found.append((name, value, as_written))
    return found, problems
