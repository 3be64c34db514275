"""A config's name and key=value words in, one typed `Config` with the origin of every value out.

Defaults <- `base:` files in order <- the file <- the command line. All problems are reported at once: unknown keys
(with the nearest valid name) and wrong types of every layer, files that can't be read, interpolations that lead nowhere,
credentials. Rules between keys are not known here: see parallel/legality/verdict.py.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.coerce import convert, convert_entry
from configs.errors import ConfigError, Problem
from configs.fields import walk
from configs.keys import WORDS, all_keys, keys_within
from configs.layers import Layers
from configs.schema import Config
from configs.secrets import check_secrets
from configs.sources import ConfigSource, file_sources, override_values, parse_yaml


@dataclass(frozen=True)
class Loaded:
    """A config, and where each value came from: "default", a file, or "command line"."""

    config: Config
    origin: dict[str, str]

    @property
    def text(self) -> str:
        """The config as YAML, everything stated and resolved."""
        return to_yaml(self.config)


@dataclass(frozen=True)
class Reading:
    """What could be read, and why the rest could not. `doubtful`: keys whose value is perhaps not what was meant."""

    loaded: Loaded
    problems: list[Problem]
    doubtful: frozenset[str]


def _nest(values: dict[str, Any]) -> dict[str, Any]:
    tree = asdict(Config())
    for path, value in values.items():
        *sections, name = path.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[name] = value
    return tree


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_interpolation, value.values()))
    return any(map(_has_interpolation, value)) if isinstance(value, list) else isinstance(value, str) and "${" in value


def _resolve(layers: Layers) -> dict[str, Any]:
    """The values with `${other.key}` replaced; broken ones become problems and are left out."""
    waiting = {path: value for path, value in layers.values.items() if _has_interpolation(value)}
    resolved = {path: value for path, value in layers.values.items() if path not in waiting}
    tree = OmegaConf.create(_nest(layers.values)) if waiting else OmegaConf.create()
    for path, value in waiting.items():
        try:
            got = OmegaConf.select(tree, path, throw_on_missing=True)
            resolved[path] = OmegaConf.to_container(got, resolve=True) if OmegaConf.is_config(got) else got
        except (OmegaConfBaseException, RecursionError) as error:
            detail = str(error).split("\n")[0] or "it goes round in a circle"
            layers.refuse(
                path, value, f"interpolation can't be resolved: {detail}", "name a key that exists: ${batch.seq_length_tokens}"
            )
    return resolved


def escape(value: Any) -> Any:
    """A value whose `${` stays text when OmegaConf reads it again."""
    if isinstance(value, dict):
        return {name: escape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _convert(values: dict[str, Any], layers: Layers) -> Config:
    """The typed config; values of a wrong type become problems, and their keys keep their defaults."""
    config = Config()
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        key = all_keys().get(path) or all_keys()[section]
        words = key.words if key.path == path else WORDS[key.type]
        try:
            typed = convert(key, value) if key.path == path else convert_entry(key, value)
        except ValueError:
            layers.refuse(path, value, f"must be {words} (from: {layers.origin[path]})", f"give {path} {words}")
            continue
        owner: Any = config
        for part in section.split("."):
            owner = getattr(owner, part)
        if isinstance(owner, dict):
            owner[name] = typed
        else:
            setattr(owner, name, typed)
    return config


def _finish(layers: Layers) -> Loaded:
    values = _resolve(layers)
    config = _convert(values, layers)
    layers.problems += check_secrets(values)
    paths = dict.fromkeys(re.sub(r"\[\d+\].*", "", path) for path, _, _ in walk(config))
    origin = {path: layers.origin.get(path, "default") for path in paths}
    origin |= {path: source for path, source in layers.origin.items() if path not in origin}
    return Loaded(config, origin)


def read_config(name_or_path: str, overrides: Sequence[str] = ()) -> Reading:
    """The config of a file or shipped name under key=value overrides, as far as it can be read, with every problem found."""
    layers = Layers()
    sources, problems = file_sources(name_or_path)
    words, word_problems = override_values(overrides)
    layers.problems += problems + word_problems
    for source in sources:
        layers.merge(source)
    for path, value, text in words:
        layers.override(path, value, text)
    loaded = _finish(layers)
    # A file that can't be read, or a word that is no key=value, may be about any key.
    unread = [keys_within(problem.path) or set(all_keys()) for problem in problems + word_problems]
    within = [keys_within(path) or {path} for path in layers.doubtful]
    return Reading(loaded, layers.problems, frozenset().union(*unread, *within))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Loaded:
    """What `read_config` reads. Raises ConfigError with every problem found."""
    reading = read_config(name_or_path, overrides)
    if reading.problems:
        raise ConfigError(reading.problems)
    return reading.loaded


def from_yaml_text(text: str, name: str = "config.yaml") -> Config:
    """The config of a resolved file's text (`to_yaml`). Raises ConfigError; `name` is blamed for unreadable YAML."""
    layers = Layers()
    tree, texts, layers.problems = parse_yaml(text, name)
    layers.merge(ConfigSource(name, tree, texts))
    loaded = _finish(layers)
    if layers.problems:
        raise ConfigError(layers.problems)
    return loaded.config


def to_yaml(config: Config) -> str:
    """The config as YAML in the schema's order, everything stated: `from_yaml_text(to_yaml(c)) == c`."""
    return OmegaConf.to_yaml(OmegaConf.create(escape(asdict(config))))
