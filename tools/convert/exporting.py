"""Phalanx checkpoint -> Hugging Face folder, which transformers loads without a warning.

In: a checkpoint, imported or trained under any layout. Out: a folder with config.json, generation_config.json, tokenizer
files, model-*.safetensors and their index. The padding of the vocabulary is cut off.

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
from pretrain.data.tokenizer import TextTokenizer
from pretrain.run.files import read_json, write_json
from tools.convert.checkpoints import damage, find_checkpoint, model_of, open_manifest
from tools.convert.families import family_for, family_named, family_of
from tools.convert.file_plan import PlannedTensor, WriteUnit, cut_rows, plan_files
from tools.convert.hf_config.family import Family
from tools.convert.hf_config.model_differences import model_differences
from tools.convert.hf_config.preset import HARMLESS
from tools.convert.hf_files import INDEX
from tools.convert.output_folder import OutputFolder, WorkShare, check_output_path
from tools.convert.overflow import check_range
from tools.convert.tensors.checkpoint_tensors import CheckpointTensors
from tools.convert.tensors.dtypes import FLOATS, NAMES, Array, convert, widest
from tools.convert.tensors.import_source import read_rows
from tools.convert.tensors.weight_map import WeightMap, make_weight_map, width
from tools.convert.tokenizer_files import COMPANIONS, find_tokenizer, special_ids, write_tokenizer

FILE_BYTES = 5 << 30
_TORCH_NAMES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "F64": "float64"}


def choose_family(model: Model, folder: Path, named: str | None) -> Family:
    """The family of an export: `named`, else the family the model was imported from, else the first that can express the model.

    Raises ConfigError when that family can't express every key of the model.
    """
    original = read_json(folder / COMPANIONS / "config.json")
    if named:
        family = family_named(named)
    elif isinstance(original, dict):
        family = family_of(original)
    else:
        return family_for(model)
    again, problems = family.to_model(family.to_hf_config(model))
    different = model_differences(model, again)
    if problems or different:
        rule = f"can't be expressed in the config.json of {family.name}: " + "; ".join([*different, *(p.rule for p in problems)])
        raise ConfigError(Problem("model", model.name, rule, "export it as another family (--family)"))
    return family


def hf_config(family: Family, model: Model, folder: Path, tokenizer: TextTokenizer | None, dtypes: set[str]) -> dict[str, Any]:
    """The content of config.json.

    The architecture keys come from `model`. Keys of an imported model's own config.json that don't describe the architecture
    are kept.
    """
    original = read_json(folder / COMPANIONS / "config.json")
    architecture_keys = family.to_hf_config(model)
    kept: dict[str, Any] = {}
    if isinstance(original, dict):
        dropped = {"quantization_config", "auto_map", "torch_dtype", "dtype", "architectures", "model_type"}
        kept = {k: v for k, v in original.items() if k in HARMLESS - dropped and k not in architecture_keys}
    dtype = _TORCH_NAMES["F32" if "F32" in dtypes and len(dtypes) == 1 else next(iter(sorted(dtypes - {"F32"})), "F32")]
    # transformers 5 reads dtype, older versions read torch_dtype.
    return {**architecture_keys, **kept, **special_ids(folder, tokenizer), "dtype": dtype, "torch_dtype": dtype}


def _dtypes(weight_map: WeightMap, checkpoint: CheckpointTensors, wanted: str) -> dict[str, str]:
    """Element type of each exported tensor. The router's selection bias keeps its type, whatever type is wanted."""
    found: dict[str, set[str]] = {}
    exact: set[str] = set()
    for (name, _), mappings in weight_map.by_hf.items():
        found.setdefault(name, set()).update(checkpoint.dtype(mapping.name) for mapping in mappings)
        if mappings[0].name.endswith("expert_bias"):
            exact.add(name)
    keep = wanted == "keep"
    return {name: widest(types) if keep or name in exact else NAMES[wanted] for name, types in found.items()}


def planned_tensors(weight_map: WeightMap, dtypes: dict[str, str], copies: dict[str, str]) -> Iterator[PlannedTensor]:
    """The tensors of the files, with the tables that the family stores a second time (`copies`: name -> original)."""
    leads: dict[str, list[tuple[int, ...]]] = {}
    for name, lead in weight_map.by_hf:
        leads.setdefault(name, []).append(lead)
    for key, name in [*((name, name) for name in leads), *copies.items()]:
        shape, dtype = weight_map.hf_shapes[name], dtypes[name]
        parts: list[tuple[tuple[int, ...], int, int]] = []
        plain = all(mapping.is_plain for lead in leads[name] for mapping in weight_map.by_hf[(name, lead)])
        for lead in sorted(leads[name]):
            rows = shape[len(lead)]
            cuts = cut_rows(rows, width(shape, lead) * FLOATS[dtype].itemsize) if plain else [(0, rows)]
            parts += [(lead, first, count) for first, count in cuts]
        yield PlannedTensor(key, dtype, shape, name, tuple(parts), not plain)


def fill_hf_tensor(unit: WriteUnit, out: Array, weight_map: WeightMap, checkpoint: CheckpointTensors) -> None:
    """Fill `out` with the rows of an exported tensor that `unit` names. The rows come from the checkpoint."""
    for mapping in weight_map.by_hf[(unit.name, unit.lead)]:
        dtype = checkpoint.dtype(mapping.name)
        if not mapping.is_plain:
            values = convert(read_rows(checkpoint, mapping.name, mapping.lead, mapping.row, mapping.rows), dtype, unit.dtype)
            matrix = out.T if mapping.transposed else out
            matrix[mapping.hf_row : mapping.hf_end : mapping.hf_step] = values
            continue
        low, high = max(unit.first, mapping.hf_row), min(unit.first + unit.rows, mapping.hf_end)
        if low >= high:
            continue
        rows, row = out[low - unit.first : high - unit.first], mapping.row + low - mapping.hf_row
        if dtype == unit.dtype:
            checkpoint.read_into(mapping.name, mapping.lead, row, rows)
        else:
            rows[...] = convert(read_rows(checkpoint, mapping.name, mapping.lead, row, high - low), dtype, unit.dtype)


def _check_tensors(weight_map: WeightMap, checkpoint: CheckpointTensors) -> None:
    """Raises ConfigError unless the checkpoint holds exactly the tensors of its model."""
    held = {name: tuple(value["shape"]) for name, value in checkpoint.manifest.tensors.items()}
    wrong = sorted(name for name in held.keys() | weight_map.shapes.keys() if held.get(name) != weight_map.shapes.get(name))
    if wrong:
        shown = {name: [held.get(name), weight_map.shapes.get(name)] for name in wrong[:6]}
        rule = f"must hold the tensors of its model; {len(wrong)} differ (held, needed)"
        raise ConfigError(Problem("manifest.json: tensors", shown, rule, "name another checkpoint"))


def export_model(
    path: Path,
    out: Path,
    dtype: str,
    share: WorkShare,
    workers: int,
    force: bool,
    family_name: str | None = None,
    tokenizer_path: str | None = None,
) -> dict[str, Any]:
    """Export a checkpoint to a Hugging Face folder.

    Returns the JSON document of `phalanx convert export`. Raises ConfigError.
    """
    folder = find_checkpoint(path)
    place = check_output_path(out, folder, force)
    manifest = open_manifest(folder)
    model = model_of(manifest)
    if model.max_position_tokens is None:
        model.max_position_tokens = manifest.config["batch"]["seq_length_tokens"]
    family = choose_family(model, folder, family_name)
    tokenizer = find_tokenizer(manifest, folder, tokenizer_path)
    weight_map = make_weight_map(family, model)
    notes = family.notes(family.to_hf_config(model), model)
    try:
        checkpoint = CheckpointTensors(folder)
        _check_tensors(weight_map, checkpoint)
        dtypes = _dtypes(weight_map, checkpoint, dtype)
        copies = {name: original for name, original in family.copies(model).items() if original in weight_map.hf_shapes}
        entries = list(planned_tensors(weight_map, dtypes, copies))
        files = plan_files(entries, FILE_BYTES, _file_name, {"format": "pt"})
        config = hf_config(family, model, folder, tokenizer, set(dtypes.values()))

        def fill(unit: WriteUnit, rows: Array) -> None:
            fill_hf_tensor(unit, rows, weight_map, checkpoint)

        if dtype != "keep":
            has_f64 = any(checkpoint.dtype(name) == "F64" for name in weight_map.shapes)
            check_range(files, share, workers, fill, has_f64)
        output = OutputFolder(place, files, [manifest.as_json(), config], force, summed=False)
        written = output.write(share, workers, fill, checkpoint.verify_pending)

        def complete(partial: Path, sums: dict[str, dict[str, int]]) -> None:
            write_json(partial / "config.json", config)
            if len(sums) > 1:
                weight_map = {key: name for name, keys in sums.items() for key in keys}
                total = sum(prod(entry.shape) * FLOATS[entry.dtype].itemsize for entry in entries)
                write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            notes.extend(write_tokenizer(partial, folder, tokenizer, config["model_type"], tokenizer_path is not None))

        finished = output.finish(share, complete)
        checkpoint.close()
    except DamagedFile as error:
        raise ConfigError(damage(folder, error)) from error
    return {
        "out": str(out),
        "checkpoint": str(folder),
        "family": family.name,
        "finished": finished,
        "tensors_read": len(weight_map.shapes),
        "tensors_written": len(entries),
        "bytes_written": written,
        "notes": notes,
    }


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
