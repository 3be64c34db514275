"""Hugging Face or Megatron-LM folder -> Phalanx checkpoint: weights by canonical name, without an optimizer.

In: a Hugging Face folder, or a torch_dist checkpoint (megatron_lm/). Out: a checkpoint folder that `checkpoint.load`, `phalanx
generate` and `convert export` read. It also holds model.yaml, the preset of the model, and the config.json, tokenizer and
generation files of a Hugging Face folder, unchanged, in huggingface/. No process group is needed.

Torch-free.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from configs.schema import Config, TokenizerConfig
from parallel.layout import Layout
from pretrain.checkpoint.allowed_changes import architecture
from pretrain.checkpoint.manifest import FORMAT, Manifest, slice_key
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.data.tokenizer import load_tokenizer
from pretrain.model.tensor_slice import TensorSlice
from pretrain.run.files import write_atomically
from pretrain.run.folder import COMPLETE
from tools.convert.families import text_part
from tools.convert.file_plan import PlannedTensor, WriteUnit, cut_rows, plan_files
from tools.convert.hf_config.family import Family
from tools.convert.hf_config.hybrid import DEPTH_KEYS
from tools.convert.hf_config.preset import interpret_config, preset_yaml, read_config
from tools.convert.hf_files import HfFiles, check_quantization, first_of
from tools.convert.megatron_lm.open_checkpoint import is_megatron, open_megatron
from tools.convert.output_folder import OutputFolder, WorkShare, check_output_path
from tools.convert.overflow import check_range
from tools.convert.tensors.canonical_shapes import Shape
from tools.convert.tensors.dtypes import NAMES, RAW, Array, convert, widest
from tools.convert.tensors.import_source import ImportSource, TensorReader, check_model, read_rows
from tools.convert.tensors.row_mappings import RowMapping
from tools.convert.tensors.weight_map import TensorPart, WeightMap, make_weight_map, width
from tools.convert.tokenizer_files import COMPANIONS, companion_files, copy_files, left_out_note

FILE_BYTES = 2 << 30
_SHOWN = 8


def open_huggingface(folder: Path) -> ImportSource:
    """Read and check everything of a Hugging Face folder except the numbers. Raises ConfigError with all problems."""
    config = read_config(folder)
    family, model, problems, notes = interpret_config(config)
    whole_config = {**text_part(config), **config}
    problems += check_quantization(folder, whole_config)
    if not problems:
        problems = check_model(model, "this model can't be converted; for planning: phalanx model config.json --to-yaml")
    if problems:
        raise ConfigError(problems)
    # A multimodal model's files hold its language model under one name.
    part = "" if text_part(config) is config else "language_model."
    files = HfFiles(folder, whole_config, part, family.renamed)
    if files.num_left_out:
        notes.append(f"{files.num_left_out} tensors outside of the language model are left out, and no export has them")
    if family.depth_prefix and not set(DEPTH_KEYS) & set(text_part(config)):
        model.mtp.num_layers = int(any(name.startswith(family.depth_prefix) for name in files.tensors))
    if model.mtp.num_layers and not any(_is_mtp(name, model) for name in files.tensors):
        notes.append(
            f"config.json names {model.mtp.num_layers} MTP layers, the files hold none: the model was imported without MTP"
        )
        model.mtp.num_layers = 0
    model.name, model.source = folder.resolve().name, f"imported from a Hugging Face folder of type {family.name}"
    weight_map = make_weight_map(family, model, files.tensors.__contains__)
    for start, what in family.left_out:
        names = [name for name in files.tensors if name.startswith(start) and name not in weight_map.hf_shapes]
        if names:
            shown = ", ".join(names[:_SHOWN]) + (" and so on" if len(names) > _SHOWN else "")
            notes.append(f"left out: {what}, {len(names)} tensors of the files: {shown}")
    problems = _hold_against(weight_map, files, family, model)
    if problems:
        raise ConfigError(first_of(problems))
    if not weight_map.by_hf:
        raise ConfigError(Problem(str(folder), 0, "must hold tensors", "name a model's folder"))
    # Real paths: shards of one conversion may name the folder in different ways.
    places = {file: os.path.realpath(file) for file, _ in files.raw.values()}
    heads = {name: [places[file], entry.dtype, entry.shape, entry.start] for name, (file, entry) in files.raw.items()}
    num_tensors = len(weight_map.hf_shapes) + len(files.factors)
    notes += left_out_note(folder)
    return ImportSource(folder, family.name, model, files, weight_map, [config, heads], num_tensors, True, notes)


def open_source(folder: Path, preset: str | None = None) -> ImportSource:
    """The folder of an import, of either format. `preset`: the model, when a Megatron-LM checkpoint doesn't state it.

    Raises ConfigError.
    """
    if is_megatron(folder) and not (folder / "config.json").is_file():
        return open_megatron(folder, preset)
    if preset is not None:
        rule = "must be absent for a Hugging Face folder: its config.json states the model"
        raise ConfigError(Problem("--model", preset, rule, "leave it out"))
    return open_huggingface(folder)


def _is_mtp(name: str, model: Model) -> bool:
    parts = name.split(".")
    return parts[0] == "mtp" or (
        len(parts) > 2 and parts[1] == "layers" and parts[2].isdigit() and int(parts[2]) >= model.num_layers
    )


def _hold_against(weight_map: WeightMap, files: HfFiles, family: Family, model: Model) -> list[Problem]:
    """Problems between config.json and the files: missing tensors, unused tensors, wrong shapes, repeated tables that differ."""
    problems, fix = [], "convert the files that belong to this config.json"
    missing = [name for name in weight_map.hf_shapes if name not in files.tensors]
    if missing:
        rule = f"must hold every tensor of config.json's model; {len(missing)} are missing"
        problems.append(Problem(str(files.folder), missing[:_SHOWN], rule, fix))
    for name, shape in weight_map.hf_shapes.items():
        if name in files.tensors and files.shape(name) != shape:
            problems.append(Problem(name, list(files.shape(name)), f"must be of shape {list(shape)} by config.json", fix))
    copies = family.copies(model)
    if model.tie_embeddings:
        copies = {name: original for name, original in copies.items() if original != "lm_head.weight"}
        copies |= {"lm_head.weight": "model.embed_tokens.weight"}
    known = {*weight_map.hf_shapes, *copies}
    starts = tuple(start for start, _ in family.left_out)
    left = [name for name in files.tensors if name not in known and not name.startswith(starts)]
    if left:
        rule = f"must hold only tensors of the model; these {len(left)} have no place in it and would be lost"
        problems.append(Problem(str(files.folder), left[:_SHOWN], rule, fix))
    if not problems:
        for name, original in copies.items():
            if name in files.tensors and not _equal(files, name, original):
                rule = f"must equal {original}: this model has one table for both"
                problems.append(Problem(name, "other numbers", rule, "this model can't be converted"))
    return problems


def _equal(files: HfFiles, name: str, original: str) -> bool:
    shape = files.shape(name)
    if shape != files.shape(original) or files.dtype(name) != files.dtype(original):
        return False
    row_bytes = width(shape, ()) * RAW[files.dtype(name)].itemsize
    return all(
        np.array_equal(_bits(read_rows(files, name, (), first, rows)), _bits(read_rows(files, original, (), first, rows)))
        for first, rows in cut_rows(shape[0], row_bytes)
    )


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.uint8)


def element_types(source: ImportSource, wanted: str) -> dict[str, str]:
    """Element type of each canonical tensor. The router's selection bias keeps its type, whatever type is wanted."""
    found: dict[str, set[str]] = {}
    for (name, _), mappings in source.weight_map.by_canonical.items():
        found.setdefault(name, set()).update(source.files.dtype(mapping.hf_name) for mapping in mappings)
    keep = wanted == "keep"
    return {name: widest(types) if keep or name.endswith("expert_bias") else NAMES[wanted] for name, types in found.items()}


def _entries(weight_map: WeightMap, dtypes: dict[str, str]) -> Iterator[PlannedTensor]:
    """The slices of the checkpoint: whole tensors, cut by rows when they are large."""
    for name, lead in weight_map.by_canonical:
        mappings = weight_map.by_canonical[(name, lead)]
        plain = all(mapping.is_plain for mapping in mappings)
        # Slices end where the files' tensors end: an export then reads whole slices and checks their sums on the way.
        edges = [mapping.row for mapping in mappings if mapping.row]
        yield from cut_slices(name, lead, weight_map.shapes[name], dtypes[name], edges, plain)


def cut_slices(
    name: str, lead: tuple[int, ...], shape: tuple[int, ...], dtype: str, edges: Iterable[int], plain: bool
) -> Iterator[PlannedTensor]:
    """The slices of tensor[lead], of which none crosses one of `edges`. `plain`: its rows can be filled separately."""
    inner, rows = shape[len(lead) + 1 :], shape[len(lead)]
    cuts = cut_rows(rows, width(shape, lead) * RAW[dtype].itemsize, edges) if plain else [(0, rows)]
    for first, count in cuts:
        slice_ = TensorSlice((*lead, first, *(0 for _ in inner)), (*(1 for _ in lead), count, *inner))
        parts = ((lead, first, count),)
        yield PlannedTensor(slice_key("weight", name, slice_, 0, slice_.size), dtype, (slice_.size,), name, parts, not plain)


def fill_canonical_tensor(unit: WriteUnit, out: Array, weight_map: WeightMap, files: TensorReader) -> None:
    """Fill `out` with the rows of a canonical tensor that `unit` names. The padding of the vocabulary is zero."""
    last, edge = unit.first + unit.rows, unit.first
    whole: dict[TensorPart, Array] = {}
    for mapping in weight_map.by_canonical[(unit.name, unit.lead)]:
        low, high = max(unit.first, mapping.row), min(last, mapping.row + mapping.rows)
        if low >= high:
            continue
        rows, dtype = out[low - unit.first : high - unit.first], files.dtype(mapping.hf_name)
        if mapping.is_plain and dtype == unit.dtype:
            files.read_into(mapping.hf_name, mapping.hf_lead, mapping.hf_row + low - mapping.row, rows)
        else:
            rows[...] = convert(_hf_rows(mapping, low - mapping.row, high - low, files, whole), dtype, unit.dtype)
        edge = max(edge, high)
    out[edge - unit.first :] = 0


def _hf_rows(mapping: RowMapping, skip: int, rows: int, files: TensorReader, whole: dict[TensorPart, Array]) -> Array:
    """`rows` rows of a mapping, from its row `skip` on, in the canonical order."""
    if mapping.is_plain:
        return read_rows(files, mapping.hf_name, mapping.hf_lead, mapping.hf_row + skip, rows)
    key = (mapping.hf_name, mapping.hf_lead)
    if key not in whole:
        whole[key] = read_rows(files, mapping.hf_name, mapping.hf_lead, 0, files.shape(mapping.hf_name)[len(mapping.hf_lead)])
    matrix = whole[key].T if mapping.transposed else whole[key]
    return matrix[mapping.hf_row : mapping.hf_end : mapping.hf_step][skip : skip + rows]


def import_model(
    folder: Path, out: Path, dtype: str, share: WorkShare, workers: int, force: bool, preset: str | None = None
) -> dict[str, Any]:
    """Import a folder as a checkpoint.

    Returns the JSON document of `phalanx convert import`. Raises ConfigError.
    """
    source = open_source(folder, preset)
    place = check_output_path(out, folder, force)
    dtypes = element_types(source, dtype)
    entries = list(_entries(source.weight_map, dtypes))
    files = plan_files(entries, FILE_BYTES, lambda number, count: f"part_{number:05d}.safetensors", {})

    def fill(unit: WriteUnit, rows: Array) -> None:
        fill_canonical_tensor(unit, rows, source.weight_map, source.files)

    try:
        if dtype != "keep":
            has_f64 = any(source.files.dtype(name) == "F64" for name in source.weight_map.hf_shapes)
            check_range(files, share, workers, fill, has_f64)
        output = OutputFolder(place, files, [source.identity, dtype], force)
        written = output.write(share, workers, fill)
    except DamagedFile as error:
        raise ConfigError(Problem(str(source.folder), "damaged", str(error), "copy or download the folder again")) from error
    sizes = {file.name: file.num_bytes for file in files}
    kept = [Path("config.json"), *companion_files(folder)] if source.companions else []
    shapes = source.weight_map.shapes
    finished = output.finish(
        share, lambda partial, sums: complete_checkpoint(partial, sums, folder, source.model, shapes, dtypes, sizes, kept)
    )
    source.files.close()
    return {
        "out": str(out),
        "family": source.kind,
        "finished": finished,
        "tensors_read": source.num_tensors,
        "tensors_written": len(source.weight_map.shapes),
        "bytes_written": written,
        "notes": source.notes,
    }


def complete_checkpoint(
    partial: Path,
    sums: dict[str, dict[str, int]],
    folder: Path,
    model: Model,
    shapes: dict[str, Shape],
    dtypes: dict[str, str],
    sizes: dict[str, int],
    kept: list[Path],
) -> None:
    """Write index.json, manifest.json, the files of `folder` that are `kept`, and last the COMPLETE marker."""
    copy_files(folder, kept, partial / COMPANIONS)
    write_atomically(partial / "model.yaml", preset_yaml(model, f"{model.name}: {model.source}"))
    write_atomically(partial / "index.json", json.dumps(sums))
    tensors = {name: {"shape": list(shape), "dtype": dtypes[name]} for name, shape in shapes.items()}
    manifest = weights_manifest(model, tensors, sizes, _tokenizer(folder))
    write_atomically(partial / "manifest.json", manifest.as_json())
    write_atomically(partial / COMPLETE, "")


def weights_manifest(
    model: Model, tensors: dict[str, dict[str, Any]], sizes: dict[str, int], tokenizer: dict[str, Any] | None
) -> Manifest:
    """The manifest of a checkpoint that holds weights only: step 0, no optimizer."""
    assert model.vocab_size, "a converted model states its vocabulary"
    return Manifest(
        format=FORMAT, step=0, consumed_samples=0, tokens=0, optimizer_steps=None, horizon_steps=None, engine="megatron",
        zero_stage=0, layout=Layout().degrees(), model=architecture(model, model.vocab_size), vocab_size=model.vocab_size,
        tokenizer=tokenizer, data=None, config=asdict(Config(model=model)), kinds=("weight",), tensors=tensors, files=sizes,
        world_size=1,
    )  # fmt: skip


def _tokenizer(folder: Path) -> dict[str, Any] | None:
    """Identity of the folder's tokenizer.json; None when there is none, or when it can't be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return load_tokenizer(TokenizerConfig(kind="huggingface", path=str(path))).identity()
    except ConfigError:
        # A tokenizer without an end-of-document token can't be used for training here. The weights can.
        return None
