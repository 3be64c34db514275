"""Plain values to the types that the schema states. In: a key and what was written. Out: the typed value, or ValueError.

OmegaConf's own nodes convert scalars ("1e-3" is a number, yes is true), one by one: a structured config of the whole
schema costs 50 ms, which every command would pay.

Torch-free.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode

from configs.keys import Key, keys_of

_NODES = {int: IntegerNode(), float: FloatNode(), bool: BooleanNode(), str: StringNode()}


def convert(key: Key, value: Any) -> Any:
    """A scalar's or list's value in the key's type; None where the key may be unset. A mapping has its entries converted."""
    if value is None and key.optional:
        return None
    if key.kind == "scalar":
        return _scalar(key.type, value)
    if key.kind == "mapping":
        raise ValueError(f"{value!r} is no mapping")
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return [_part(key.type, item) if is_dataclass(key.type) else _scalar(key.type, item) for item in value]


def convert_entry(key: Key, value: Any) -> Any:
    """The value of one entry of a mapping (launch.env)."""
    return _scalar(key.type, value)


def _scalar(kind: type, value: Any) -> Any:
    """ValueError, of which OmegaConf's ValidationError is a kind, when the value is of another type."""
    if value is None or value == "???":
        raise ValueError("a value is missing")
    if kind is int and isinstance(value, float) and value.is_integer():
        # run.tokens=13e12: YAML reads an exponent as a float. Exact up to 2^53; above, as exact as what was written.
        value = int(value)
    try:
        return _NODES[kind].validate_and_convert(value)
    except OverflowError as error:
        raise ValueError("a whole number that no float can hold") from error


def _part(kind: type, value: Any) -> Any:
    """An item of a list of parts, {path, weight}; keys left out have their defaults."""
    if not isinstance(value, dict) or not set(value) <= {item.name for item in fields(kind)}:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    lacking = [item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING]
    assert not lacking, f"{kind.__name__} needs defaults for {lacking}"
    return kind(**{name: convert(keys_of(kind)[name], item) for name, item in value.items()})
