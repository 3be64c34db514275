"""The description of a checkpoint, readable without torch: manifest.json, index.json and the COMPLETE marker.

    checkpoints/step_0000100/
        manifest.json            step, samples, model, tokenizer, layout, engine, and tensors by canonical name
        index.json               which file holds which slice, with the CRC-32 of its bytes
        rank_00000.safetensors   slices that rank 0 wrote, 1-D, keyed  KIND:NAME[first:stop,…]  or  …[…](start:stop)
        COMPLETE                 written last, after everything above was synced
The end of a folder's name tells its state. .partial: the save didn't finish. .damaged: a resume found it damaged.
.rolled_back: the run returned to an earlier checkpoint.

Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import Problem
from configs.fields import walk
from configs.model_schema import Model
from pretrain.checkpoint.allowed_changes import is_allowed
from pretrain.checkpoint.tensor_file import DamagedFile, UnfitFile
from pretrain.model.tensor_slice import TensorSlice
from pretrain.run.files import read_json
from pretrain.run.folder import COMPLETE

FORMAT = 1
_KEY = re.compile(r"^(?P<kind>\w+):(?P<name>[^\[]+)\[(?P<slice>[^\]]*)\](?:\((?P<start>\d+):(?P<stop>\d+)\))?$")


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    `tensors`: canonical name -> {"shape", "dtype"}. `kinds`: the kinds of values that are stored of each tensor.
    """

    format: int
    step: int
    consumed_samples: int
    tokens: int
    optimizer_steps: int | None
    horizon_steps: int | None
    engine: str
    zero_stage: int
    layout: dict[str, Any]
    model: dict[str, Any]
    vocab_size: int
    tokenizer: dict[str, Any] | None
    data: dict[str, Any] | None
    config: dict[str, Any]
    kinds: tuple[str, ...]
    tensors: dict[str, dict[str, Any]]
    files: dict[str, int]
    world_size: int

    @property
    def model_identity(self) -> str:
        """A short hash of the architecture. It is equal for checkpoints whose weights are interchangeable."""
        return identity_of(self.model)

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "model_identity": self.model_identity}, indent=2, allow_nan=False) + "\n"


def identity_of(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of the value's JSON text with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StoredSlice:
    """A stored slice: the flat range [start, stop) of `tensor_slice` of tensor `name`. `crc32`: of its bytes in `file`."""

    kind: str
    name: str
    tensor_slice: TensorSlice
    start: int
    stop: int
    file: str
    crc32: int

    @property
    def key(self) -> str:
        return slice_key(self.kind, self.name, self.tensor_slice, self.start, self.stop)


def slice_key(kind: str, name: str, slice_: TensorSlice, start: int, stop: int) -> str:
    """The key of a slice inside a file."""
    spans = ",".join(f"{low}:{low + size}" for low, size in zip(slice_.offset, slice_.shape, strict=True))
    part = "" if (start, stop) == (0, slice_.size) else f"({start}:{stop})"
    return f"{kind}:{name}[{spans}]{part}"


def parse_key(key: str) -> tuple[str, str, TensorSlice, int, int]:
    """The inverse of `slice_key`: (kind, name, slice, start, stop). Raises DamagedFile for other texts."""
    match = _KEY.match(key)
    if not match:
        raise DamagedFile(f"{key!r} does not name a slice of a tensor")
    spans = [tuple(int(edge) for edge in span.split(":")) for span in match["slice"].split(",") if span]
    slice_ = TensorSlice(tuple(low for low, _ in spans), tuple(high - low for low, high in spans))
    start, stop = (int(match["start"]), int(match["stop"])) if match["start"] else (0, slice_.size)
    return match["kind"], match["name"], slice_, start, stop


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises DamagedFile, and UnfitFile when another version wrote it."""
    if not (folder / COMPLETE).exists():
        raise DamagedFile(f"{folder} has no {COMPLETE} marker")
    value = read_json(folder / "manifest.json")
    if not isinstance(value, dict) or not isinstance(value.get("format"), int):
        raise DamagedFile(f"{folder}/manifest.json is no JSON of a manifest")
    if value["format"] != FORMAT:
        raise UnfitFile(f"{folder}/manifest.json is of format {value['format']}, this version reads {FORMAT}")
    try:
        manifest = Manifest(**{**{k: v for k, v in value.items() if k != "model_identity"}, "kinds": tuple(value["kinds"])})
    except (TypeError, KeyError) as error:
        raise UnfitFile(f"{folder}/manifest.json has other keys than format {FORMAT}: {error}") from error
    for name, num_bytes in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.exists() else None
        if size != num_bytes:
            raise DamagedFile(f"{file} is {'missing' if size is None else f'{size} bytes long'}, {num_bytes} bytes were written")
    return manifest


def unfit_problem(folder: Path, why: object) -> Problem:
    """The refusal of a whole checkpoint that this configuration or version can't use. `why`: an UnfitFile or its text."""
    rule = f"holds a whole checkpoint that this config and version can't go on from: {why}"
    return Problem("run.dir", str(folder), rule, "use the config and the version that wrote it, or another run.dir")


def read_index(folder: Path) -> Iterator[StoredSlice]:
    """Every slice of a checkpoint. Raises DamagedFile."""
    value = read_json(folder / "index.json")
    if not isinstance(value, dict):
        raise DamagedFile(f"{folder}/index.json is missing or no JSON")
    for file, sums in value.items():
        for key, crc32 in sums.items():
            kind, name, slice_, start, stop = parse_key(key)
            yield StoredSlice(kind, name, slice_, start, stop, file, crc32)


def check_identity(
    manifest: Manifest,
    folder: Path,
    model: dict[str, Any],
    tokenizer: dict[str, Any] | None,
    allowed: Sequence[str] = (),
) -> list[Problem]:
    """Problems when the checkpoint has the weights of another model or tokenizer, one for each key that differs.

    `allowed`: checkpoint.allow_change, which lets the positions change: to a longer context.
    """
    problems = []
    # A key that the checkpoint lacks was added later. Its default value describes the older checkpoints.
    written = {path: value for path, value, _ in walk(Model())} | manifest.model
    for key in sorted(model):
        path, learned = f"model.{key}", model.get("position.kind") == "learned"
        if written.get(key) == model[key] or is_allowed(path, allowed, learned):
            continue
        if is_allowed(path, [path], learned):
            rule = f"is {written.get(key)!r} in the checkpoint {folder}; a change needs your word, since the outputs change"
            fix = f"set it back, or add checkpoint.allow_change=[{path}] (or [model.position])"
        else:
            rule = f"must be {written.get(key)!r} as in the checkpoint {folder}: its tensors have other shapes or meaning"
            fix = "use the model of the checkpoint, or another run.dir for this one"
        problems.append(Problem(path, model[key], rule, fix))
    if manifest.tokenizer and tokenizer and manifest.tokenizer.get("sha256") != tokenizer.get("sha256"):
        rule = f"must be the tokenizer of the checkpoint {folder} (sha256 {str(manifest.tokenizer.get('sha256'))[:12]}…)"
        fix = "name that tokenizer's file, or another run.dir"
        problems.append(Problem("data.tokenizer.path", f"sha256 {str(tokenizer.get('sha256'))[:12]}…", rule, fix))
    return problems
