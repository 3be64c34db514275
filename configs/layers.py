"""Layers of values, each laid over the ones before: nested trees and key=value words in, raw values by dotted key out.

Keys are held against the schema's names here; types are not (configs/load.py converts once everything is resolved).

Torch-free.
"""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from configs.errors import Problem
from configs.keys import Key, all_keys, key_names, keys_of, nearest
from configs.schema import Config
from configs.secrets import shown
from configs.sources import COMMAND_LINE, ConfigSource


@dataclass
class Layers:
    """Values set so far: raw (interpolations unresolved) by dotted key; a mapping's entries have keys of their own.

    `doubtful`: keys and sections that problems are about; for an unknown name the nearest one.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)

    def refuse(self, path: str, got: Any, rule: str, fix: str) -> None:
        self.doubtful.add(path)
        self.problems.append(Problem(path, shown(path, got), rule, fix))

    def unknown(self, path: str, got: Any, source: str) -> None:
        """Refuse a key that the schema hasn't."""
        name = nearest(path)
        self.doubtful |= {name} if name else set()
        fix = f"did you mean {name}?" if name else "sections are " + ", ".join(key_names(Config))
        self.refuse(path, got, f"no such key (from: {source})", fix)

    def merge(self, source: ConfigSource) -> None:
        """Lay a source's nested values over what is set."""
        self._merge_section(Config, "", source.tree, source.texts, source.name)

    def _merge_section(self, section: type, prefix: str, tree: dict[Any, Any], texts: Any, source: str) -> None:
        known = keys_of(section, prefix)
        for name, value in tree.items():
            text = texts.get(str(name)) if isinstance(texts, dict) else None
            if name in known:
                self.set(known[name], value, text, source)
            else:
                self.unknown(f"{prefix}{name}", value, source)

    def set(self, key: Key, value: Any, text: Any, source: str) -> None:
        """Lay one key's value over what is set; `text` is the value as it was written."""
        if key.kind == "section":
            if not isinstance(value, dict):
                self.refuse(key.path, value, f"must be {key.words} (from: {source})", "leave the section out, or name its keys")
                return
            self._merge_section(key.type, key.path + ".", value, text, source)
        elif key.kind == "mapping" and isinstance(value, dict):
            for name, item in value.items():
                self.set_entry(key, str(name), item, text.get(str(name)) if isinstance(text, dict) else None, source)
        elif not self._unknown_in_items(key, value, source):
            self._put(key.path, as_written(key, value, text), source)

    def set_entry(self, key: Key, name: str, value: Any, text: Any, source: str) -> None:
        """One entry of a mapping of text (launch.env)."""
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            rule = "names of environment variables are letters, digits and _"
            self.refuse(f"{key.path}.{name}", value, rule, "rename it")
            return
        self._put(f"{key.path}.{name}", as_written(key, value, text), source)

    def _unknown_in_items(self, key: Key, items: Any, source: str) -> bool:
        """Refuse keys that a list's items (data.train) haven't; True when there were any."""
        before = len(self.problems)
        if key.kind == "list" and is_dataclass(key.type) and isinstance(items, list):
            for index, item in enumerate(items):
                for name in item if isinstance(item, dict) else ():
                    if name not in key_names(key.type):
                        rule = f"no such key in an item of {key.path} (from: {source})"
                        self.refuse(f"{key.path}[{index}].{name}", item[name], rule, f"an item is {key.item_words}")
        return len(self.problems) > before

    def _put(self, path: str, value: Any, source: str) -> None:
        self.values[path] = value
        self.origin[path] = source

    def override(self, path: str, value: Any, text: Any) -> None:
        """Lay one key=value word over what is set; the key may name an item of a list or an entry of a mapping."""
        known = all_keys()
        if path in known:
            self.set(known[path], value, text, COMMAND_LINE)
            return
        parts = path.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            key = known.get(".".join(parts[:cut]))
            if key and key.kind == "mapping" and cut == len(parts) - 1:
                return self.set_entry(key, parts[-1], value, text, COMMAND_LINE)
            if key and key.kind == "list" and parts[cut].isdigit():
                return self._override_item(key, int(parts[cut]), parts[cut + 1 :], value, text)
        self.unknown(path, value, COMMAND_LINE)

    def _override_item(self, key: Key, index: int, rest: list[str], value: Any, text: Any) -> None:
        path = f"{key.path}[{index}]" + "".join("." + part for part in rest)
        items = copy.deepcopy(self.values.get(key.path, default_of(key.path))) or []
        if not isinstance(items, list) or index >= len(items):
            count = len(items) if isinstance(items, list) else 0
            rule = f"{key.path} has {count} item{'s' if count != 1 else ''}, counted from 0"
            self.refuse(path, value, rule, f"set the whole list: {key.path}=[...]")
        elif not rest:
            items[index] = as_written(key, [value], [text])[0]
            self.set(key, items, None, COMMAND_LINE)
        elif not is_dataclass(key.type) or len(rest) > 1 or not isinstance(items[index], dict):
            self.refuse(path, value, f"an item of {key.path} is {key.item_words}", f"set the whole list: {key.path}=[...]")
        else:
            items[index] |= as_written(key, [{rest[0]: value}], [{rest[0]: text}])[0]
            self.set(key, items, None, COMMAND_LINE)


def as_written(key: Key, value: Any, text: Any) -> Any:
    """The text itself where text is wanted: YAML would turn 12:00:00 into 43200, on into true and 010 into 8."""
    if isinstance(value, list) and isinstance(text, list) and len(value) == len(text):
        return [as_written(key, item, written) for item, written in zip(value, text)]
    if is_dataclass(key.type) and isinstance(value, dict) and isinstance(text, dict):
        known = keys_of(key.type)
        return {name: as_written(known[name], item, text.get(name)) if name in known else item for name, item in value.items()}
    return text if key.type is str and isinstance(value, (bool, int, float)) and isinstance(text, str) else value


def default_of(path: str) -> Any:
    """The default of a key, as plain data."""
    value: Any = asdict(Config())
    for name in path.split("."):
        value = value[name]
    return value
