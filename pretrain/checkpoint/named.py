"""The checkpoints that a config names, and what they must agree with. In: manifests. Out: folders, or ConfigError.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.schema import Checkpoint
from pretrain.checkpoint.manifest import check_identity, read_manifest
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.run.folder import complete_checkpoints


@dataclass(frozen=True)
class Identity:
    """The model and the tokenizer that a checkpoint must match. `allowed`: checkpoint.allow_change."""

    model: dict[str, Any]
    tokenizer: dict[str, Any] | None
    allowed: tuple[str, ...] = ()


def warm_start_folder(section: Checkpoint, identity: Identity) -> Path | None:
    """The checkpoint of a warm start: the one that checkpoint.load names, or the newest of the run folder that it names.

    None without checkpoint.load. Raises ConfigError when it is incomplete or of another model.
    """
    if section.load is None:
        return None
    folder = Path(section.load)
    newest = complete_checkpoints(folder / "checkpoints") or complete_checkpoints(folder)
    folder = newest[0][1] if newest else folder
    require(folder, "checkpoint.load", section.load, identity)
    return folder


def require(folder: Path, key: str, got: object, identity: Identity) -> None:
    """Raises ConfigError for the key that names the checkpoint when the checkpoint is incomplete or of another model."""
    try:
        manifest = read_manifest(folder)
    except DamagedFile as damage:
        steps = ", ".join(str(step) for step, _ in complete_checkpoints(folder.parent)) or "none"
        rule, fix = f"must be a complete checkpoint: {damage}", f"complete ones beside it: steps {steps}"
        raise ConfigError(Problem(key, got, rule, fix)) from damage
    if problems := check_identity(manifest, folder, identity.model, identity.tokenizer, identity.allowed):
        raise ConfigError(problems)


def all_damaged(checkpoints: Path) -> Problem:
    """The problem of a run that would begin anew beside its damaged checkpoints."""
    rule = "holds checkpoints, but none of them is whole; starting at step 0 would throw the run away"
    fix = "repair one from a copy (those set aside end in .damaged), or choose another run.dir"
    return Problem("run.dir", str(checkpoints), rule, fix)
