"""What the tests of DeepSpeed's engine share: its keys, and names for them."""

from __future__ import annotations

from typing import Any

Keys = dict[str, Any]


def zero(stage: int, **more: Any) -> Keys:
    """The engine at a stage, as changes of `small_config`."""
    return {"zero__engine": "deepspeed", "zero__stage": stage, **more}


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key.split('__')[1]}{size}" for key, size in value.items() if key != "zero__engine")
    return str(value)
