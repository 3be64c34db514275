"""What a folder of weights holds, and whether it is complete.

In: a checkpoint, a run folder, or a Hugging Face folder. Out: a JSON document, and the same facts as text.

Torch-free.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from parallel.flops import count_parameters
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.run.files import read_json
from tools.convert.checkpoints import damage, find_checkpoint, model_of, open_manifest
from tools.convert.hf_files import HfFiles
from tools.convert.importing import open_huggingface
from tools.convert.tensors.checkpoint_tensors import CheckpointTensors


def inspect(path: Path) -> tuple[dict[str, Any], str]:
    """(JSON document, text) about a folder. Raises ConfigError when it has neither format, or is incomplete or damaged."""
    if not path.exists():
        raise ConfigError(Problem("PATH", str(path), "must be a folder of weights", "check the path"))
    if path.is_dir() and isinstance(read_json(path / "config.json"), dict):
        return _huggingface(path)
    return _checkpoint(find_checkpoint(path, "PATH"))


def _huggingface(path: Path) -> tuple[dict[str, Any], str]:
    source = open_huggingface(path)
    assert isinstance(source.files, HfFiles)
    model = source.model
    assert model.vocab_size, "a converted model states its vocabulary"
    dtypes = Counter(entry.dtype for _, entry in source.files.raw.values())
    size = sum(entry.stop - entry.start for _, entry in source.files.raw.values())
    total = count_parameters(model, model.vocab_size).total
    source.files.close()
    result = {
        "kind": "huggingface", "family": source.kind, "params_total": total, "tensors": len(source.files.raw),
        "dtypes": dict(dtypes), "bytes": size, "files": len({file for file, _ in source.files.raw.values()}),
        "notes": source.notes,
    }  # fmt: skip
    text = (
        f"{path}: a {source.kind} model of {total:,} parameters, {len(source.files.raw)} tensors "
        f"({_words(dtypes)}) in {result['files']} files, {size / 2**30:.2f} GiB; every tensor has its place in the model"
    )
    return result, text


def _checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    manifest = open_manifest(folder, "PATH")
    model = model_of(manifest)
    try:
        tensors = CheckpointTensors(folder)
        slices = tensors.check_all()
        tensors.close()
    except DamagedFile as error:
        raise ConfigError(damage(folder, error, "PATH")) from error
    dtypes = Counter(value["dtype"] for value in manifest.tensors.values())
    total = count_parameters(model, manifest.vocab_size).total
    result = {
        "kind": "checkpoint", "checkpoint": str(folder), "step": manifest.step, "tokens": manifest.tokens,
        "engine": manifest.engine,
        "kinds": list(manifest.kinds), "layout": manifest.layout, "model": model.name, "params_total": total,
        "vocab_size": manifest.vocab_size, "tensors": len(manifest.tensors), "dtypes": dict(dtypes), "slices": slices,
        "bytes": sum(manifest.files.values()), "files": len(manifest.files), "tokenizer": manifest.tokenizer,
    }  # fmt: skip
    text = (
        f"{folder}: {model.name}, {total:,} parameters, step {manifest.step} ({manifest.tokens:,} tokens), "
        f"engine {manifest.engine}\n"
        f"{len(manifest.tensors)} tensors ({_words(dtypes)}) in {slices} slices of {len(manifest.files)} files, "
        f"{result['bytes'] / 2**30:.2f} GiB; holds {', '.join(manifest.kinds)}; all checksums of the weights are correct"
    )
    return result, text


def _words(dtypes: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in dtypes.most_common())
