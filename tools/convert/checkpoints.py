"""Finding a checkpoint and the model that it holds. In: a run folder, its checkpoints, or one of them. Out: folder, Model.

Torch-free.
"""

from __future__ import annotations

import dataclasses
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from pretrain.checkpoint.manifest import Manifest, read_manifest
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.run.folder import COMPLETE, complete_checkpoints


def find_checkpoint(path: Path, key: str = "CHECKPOINT") -> Path:
    """`path` itself when it is a checkpoint, else the newest complete checkpoint of the run folder `path`.

    Raises ConfigError, with `key` as the key of the problem, when there is no complete checkpoint.
    """
    if (path / COMPLETE).exists():
        return path
    for place in (path / "checkpoints", path):
        found = complete_checkpoints(place)
        if found:
            return found[0][1]
    got = "a folder without a complete checkpoint" if path.is_dir() else "no such folder"
    rule = "must be a checkpoint (a folder with COMPLETE), or a run folder that has one"
    raise ConfigError(Problem(key, str(path), f"{rule}; it is {got}", "name runs/NAME, or runs/NAME/checkpoints/step_…"))


def open_manifest(folder: Path, key: str = "CHECKPOINT") -> Manifest:
    """The manifest of a checkpoint. Raises ConfigError when the checkpoint is damaged or has an unknown format."""
    try:
        return read_manifest(folder)
    except DamagedFile as error:
        raise ConfigError(damage(folder, error, key)) from error


def damage(folder: Path, error: DamagedFile, key: str = "CHECKPOINT") -> Problem:
    """The problem that reports a damaged checkpoint to the user."""
    return Problem(key, str(folder), f"must be whole: {error}", "name another checkpoint, or convert it again")


def model_of(manifest: Manifest) -> Model:
    """The `model` section that the checkpoint was written with, its vocabulary size filled in. Raises ConfigError."""
    try:
        model = from_plain(Model, manifest.config["model"])
    except (KeyError, TypeError) as error:
        rule = "must hold the config it was written with"
        raise ConfigError(Problem("manifest.json: config.model", str(error), rule, "name another checkpoint")) from error
    model.vocab_size = manifest.vocab_size
    return model


def from_plain(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass of type `kind` from the dict that `asdict` made. Unknown keys are ignored; missing keys keep their defaults."""
    hints = get_type_hints(kind)
    result = kind()
    for item in fields(kind):
        if item.name not in values:
            continue
        value = values[item.name]
        if is_dataclass(hints[item.name]) and isinstance(value, dict):
            value = from_plain(hints[item.name], value)
        result = dataclasses.replace(result, **{item.name: value})
    return result
