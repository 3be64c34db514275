"""Phalanx checkpoint -> Hugging Face folder: the same weights under their names, that transformers loads without a warning.

In: a checkpoint, imported or trained under any layout. Out: a folder with config.json, generation_config.json, tokenizer
files, model-*.safetensors and their index. Vocabulary padding is cut off.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.data.tokenizer import Tokenizer
from pretrain.run.files import read_json, write_json
from tools.convert.checkpoints import damage, find_checkpoint, model_of, open_manifest
from tools.convert.families import family_for, family_named, family_of
from tools.convert.file_plan import Entry, Unit, cut_rows, plan_files
from tools.convert.hf_config.family import Family
from tools.convert.hf_config.preset import HARMLESS
from tools.convert.hf_config.resolved import differences
from tools.convert.hf_files import INDEX
from tools.convert.output import Share, Workplace, check_out
from tools.convert.tensors.dtypes import FLOATS, NAMES, Array, convert, widest
from tools.convert.tensors.links import Links, make_links, width
from tools.convert.tensors.source import read_rows
from tools.convert.tensors.stored import CheckpointTensors
from tools.convert.tokenizer_files import COMPANIONS, find_tokenizer, special_ids, write_tokenizer

FILE_BYTES = 5 << 30
_TORCH_NAMES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "F64": "float64"}


def choose_family(model: Model, folder: Path, named: str | None) -> Family:
    """The family named, or the one it was imported from, or the first that can say all of it. Raises ConfigError."""
    original = read_json(folder / COMPANIONS / "config.json")
    if named:
        family = family_named(named)
    elif isinstance(original, dict):
        family = family_of(original)
    else:
        return family_for(model)
    again, problems = family.to_model(family.to_theirs(model))
    different = differences(model, again)
    if problems or different:
        rule = f"can't be said in {family.name}'s config.json: " + "; ".join([*different, *(p.rule for p in problems)])
        raise ConfigError(Problem("model", model.name, rule, "export it as another family (--family)"))
    return family


def hf_config(family: Family, model: Model, folder: Path, tokenizer: Tokenizer | None, dtypes: set[str]) -> dict[str, Any]:
    """config.json: the architecture, and of an imported model's own file what says nothing about it."""
    original = read_json(folder / COMPANIONS / "config.json")
    theirs = family.to_theirs(model)
    kept: dict[str, Any] = {}
    if isinstance(original, dict):
        dropped = {"quantization_config", "auto_map", "torch_dtype", "dtype", "architectures", "model_type"}
        kept = {k: v for k, v in original.items() if k in HARMLESS - dropped and k not in theirs}
    dtype = _TORCH_NAMES["F32" if "F32" in dtypes and len(dtypes) == 1 else next(iter(sorted(dtypes - {"F32"})), "F32")]
    # Both words: transformers 5 reads dtype, everything older torch_dtype.
    return {**theirs, **kept, **special_ids(folder, tokenizer), "dtype": dtype, "torch_dtype": dtype}


def _dtypes(links: Links, checkpoint: CheckpointTensors, wanted: str) -> dict[str, str]:
    """Element type of each tensor of the files. The router's selection bias is never rounded."""
    found: dict[str, set[str]] = {}
    exact: set[str] = set()
    for (name, _), spans in links.theirs.items():
        found.setdefault(name, set()).update(checkpoint.dtype(span.name) for span in spans)
        if spans[0].name.endswith("expert_bias"):
            exact.add(name)
    keep = wanted == "keep"
    return {name: widest(types) if keep or name in exact else NAMES[wanted] for name, types in found.items()}


def entries_of(links: Links, dtypes: dict[str, str], copies: dict[str, str]) -> Iterator[Entry]:
    """The files' tensors, with the tables that they repeat."""
    leads: dict[str, list[tuple[int, ...]]] = {}
    for name, lead in links.theirs:
        leads.setdefault(name, []).append(lead)
    for key, name in [*((name, name) for name in leads), *copies.items()]:
        shape, dtype = links.their_shapes[name], dtypes[name]
        parts: list[tuple[tuple[int, ...], int, int]] = []
        plain = all(span.is_plain for lead in leads[name] for span in links.theirs[(name, lead)])
        for lead in sorted(leads[name]):
            rows = shape[len(lead)]
            cuts = cut_rows(rows, width(shape, lead) * FLOATS[dtype].itemsize) if plain else [(0, rows)]
            parts += [(lead, first, count) for first, count in cuts]
        yield Entry(key, dtype, shape, name, tuple(parts), not plain)


def fill_theirs(unit: Unit, out: Array, links: Links, checkpoint: CheckpointTensors) -> None:
    """The rows of a tensor of the files that a unit names, from the checkpoint."""
    for span in links.theirs[(unit.name, unit.lead)]:
        dtype = checkpoint.dtype(span.name)
        if not span.is_plain:
            values = convert(read_rows(checkpoint, span.name, span.lead, span.row, span.rows), dtype, unit.dtype)
            matrix = out.T if span.transposed else out
            matrix[span.hf_row : span.hf_end : span.hf_step] = values
            continue
        low, high = max(unit.first, span.hf_row), min(unit.first + unit.rows, span.hf_end)
        if low >= high:
            continue
        rows, row = out[low - unit.first : high - unit.first], span.row + low - span.hf_row
        if dtype == unit.dtype:
            checkpoint.read_into(span.name, span.lead, row, rows)
        else:
            rows[...] = convert(read_rows(checkpoint, span.name, span.lead, row, high - low), dtype, unit.dtype)


def _check_tensors(links: Links, checkpoint: CheckpointTensors) -> None:
    """The checkpoint holds exactly the model's tensors. Raises ConfigError."""
    held = {name: tuple(value["shape"]) for name, value in checkpoint.manifest.tensors.items()}
    wrong = sorted(name for name in held.keys() | links.shapes.keys() if held.get(name) != links.shapes.get(name))
    if wrong:
        shown = {name: [held.get(name), links.shapes.get(name)] for name in wrong[:6]}
        rule = f"must hold the tensors of its model; {len(wrong)} differ (held, needed)"
        raise ConfigError(Problem("manifest.json: tensors", shown, rule, "name another checkpoint"))


def export_model(
    path: Path,
    out: Path,
    dtype: str,
    share: Share,
    workers: int,
    force: bool,
    family_name: str | None = None,
    tokenizer_path: str | None = None,
) -> dict[str, Any]:
    """Convert; returns what was done. Raises ConfigError."""
    folder = find_checkpoint(path)
    place = check_out(out, folder, force)
    manifest = open_manifest(folder)
    model = model_of(manifest)
    if model.max_position_tokens is None:
        model.max_position_tokens = manifest.config["batch"]["seq_length_tokens"]
    family = choose_family(model, folder, family_name)
    tokenizer = find_tokenizer(manifest, folder, tokenizer_path)
    links = make_links(family, model)
    notes: list[str] = []
    try:
        checkpoint = CheckpointTensors(folder)
        _check_tensors(links, checkpoint)
        dtypes = _dtypes(links, checkpoint, dtype)
        copies = {name: original for name, original in family.copies(model).items() if original in links.their_shapes}
        entries = list(entries_of(links, dtypes, copies))
        files = plan_files(entries, FILE_BYTES, _file_name, {"format": "pt"})
        config = hf_config(family, model, folder, tokenizer, set(dtypes.values()))
        workplace = Workplace(place, files, [manifest.as_json(), config], force, summed=False)
        written = workplace.write(share, workers, lambda unit, out: fill_theirs(unit, out, links, checkpoint), checkpoint.settle)

        def complete(partial: Path, sums: dict[str, dict[str, int]]) -> None:
            write_json(partial / "config.json", config)
            if len(sums) > 1:
                weight_map = {key: name for name, keys in sums.items() for key in keys}
                total = sum(prod(entry.shape) * FLOATS[entry.dtype].itemsize for entry in entries)
                write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            notes.extend(write_tokenizer(partial, folder, tokenizer))

        finished = workplace.finish(share, complete)
        checkpoint.close()
    except DamagedFile as error:
        raise ConfigError(damage(folder, error)) from error
    return {
        "out": str(out),
        "checkpoint": str(folder),
        "family": family.name,
        "finished": finished,
        "tensors_read": len(links.shapes),
        "tensors_written": len(entries),
        "bytes_written": written,
        "notes": notes,
    }


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
