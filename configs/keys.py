"""The schema as a table: which dotted keys exist, what each holds, and the nearest name to a wrong one.

A key is a section (a dataclass), a list, a mapping of text (launch.env), or a scalar.

Torch-free.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, Union, get_args, get_origin, get_type_hints

from configs.schema import Config

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Key:
    """One name of the schema. `type` is the scalar's, the item's (list, mapping) or the section's class."""

    path: str
    kind: str  # section, list, mapping or scalar
    type: type
    optional: bool

    @property
    def item_words(self) -> str:
        """What an item of a list, or a scalar, accepts, for people."""
        return "{" + ", ".join(key_names(self.type)) + "}" if is_dataclass(self.type) else WORDS[self.type]

    @property
    def words(self) -> str:
        """What the key accepts, for people."""
        words = {
            "section": "a mapping of its keys",
            "mapping": "a mapping of names to text, like {NAME: value}",
            "list": f"a list of {self.item_words}" if self.kind == "list" else "",
            "scalar": self.item_words if self.kind == "scalar" else "",
        }[self.kind]
        return words + (" or null" if self.optional else "")


def key_names(section: type) -> list[str]:
    """Names of the keys of a section's class, in declaration order."""
    return [item.name for item in fields(section)]


def _key(path: str, annotation: Any) -> Key:
    optional = False
    if get_origin(annotation) is Union:
        optional = NoneType in get_args(annotation)
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    if isinstance(annotation, type) and is_dataclass(annotation):
        return Key(path, "section", annotation, optional)
    if get_origin(annotation) is list:
        return Key(path, "list", get_args(annotation)[0], optional)
    if get_origin(annotation) is dict:
        return Key(path, "mapping", get_args(annotation)[1], optional)
    return Key(path, "scalar", annotation, optional)


@cache
def keys_of(section: type, prefix: str = "") -> dict[str, Key]:
    """The keys directly inside a section's class, by name; `prefix` is the section's dotted path with its dot."""
    hints = get_type_hints(section)
    return {name: _key(prefix + name, hints[name]) for name in key_names(section)}


def _walk(section: type, prefix: str) -> Iterator[Key]:
    for key in keys_of(section, prefix).values():
        yield key
        if key.kind == "section":
            yield from _walk(key.type, key.path + ".")


@cache
def all_keys() -> dict[str, Key]:
    """Every key and section of the whole config by dotted path, in declaration order."""
    return {key.path: key for key in _walk(Config, "")}


def keys_within(path: str) -> set[str]:
    """The key of a dotted path, and for a section the keys in it."""
    return {name for name in all_keys() if name == path or name.startswith(path + ".")}


def nearest(path: str) -> str | None:
    """The valid dotted path closest to a wrong one: same last name elsewhere, else the smallest change of spelling."""
    known = [name for name in all_keys() if not path.startswith(name + ".")]
    last = path.rsplit(".", 1)[-1]
    same = [name for name in known if name.rsplit(".", 1)[-1] == last]
    if same:
        return difflib.get_close_matches(path, same, n=1, cutoff=0.0)[0]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if close:
        return close[0]
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    parent = path.rsplit(".", 1)[0] + "." if "." in path else ""
    siblings = [name for name in known if name.startswith(parent) and "." not in name[len(parent) :]]
    beside = difflib.get_close_matches(parent + last, siblings, n=1, cutoff=0.6)
    if beside:
        return beside[0]
    anywhere = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)
    return by_last[anywhere[0]] if anywhere else None
