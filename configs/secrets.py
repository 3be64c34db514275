"""Keeps credentials out of configs: they would end in the run folder, in W&B and in logs. A value in, a verdict out.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from configs.errors import Problem

HIDDEN = "(hidden)"
_NAME = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
# W&B (40 hex digits, or the newer prefixed form), Hugging Face, OpenAI-style and AWS access keys.
_VALUE = re.compile(r"[0-9a-f]{40}|wandb_v\d+_\w{20,}|hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}")


def is_secret(path: str, value: Any) -> bool:
    """True when the name of the key or the look of the value says credential. Empty values are none."""
    if value is None or value == "":
        return False
    name = re.split(r"[.\[]", path)[-1]
    return bool(_NAME.search(name)) or (isinstance(value, str) and bool(_VALUE.fullmatch(value.strip())))


def shown(path: str, value: Any) -> Any:
    """The value as an error may print it: credentials are hidden, inside mappings and lists too."""
    if isinstance(value, Mapping):
        return {name: shown(f"{path}.{name}", item) for name, item in value.items()}
    if isinstance(value, list):
        return [shown(path, item) for item in value]
    return HIDDEN if is_secret(path, value) else value


def _strings(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(f"{path}.{name}", item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(path, item)
    elif isinstance(value, str):
        yield path, value


def check_secrets(values: Mapping[str, Any]) -> list[Problem]:
    """A problem for every value (by dotted path) that looks like a credential. The value itself is never shown."""
    found = dict.fromkeys(path for key, value in values.items() for path, text in _strings(key, value) if is_secret(path, text))
    return [
        Problem(
            path,
            HIDDEN,
            "credentials never stand in a config: it is copied to the run folder, to W&B and to logs",
            "export it in the environment of the shell or the cluster (WANDB_API_KEY), or use ~/.netrc; then revoke this one",
        )
        for path in found
    ]
