"""A Megatron-LM checkpoint as the source of an import: which iteration, which model, which tensor is which.

In: the folder of a run or of one iteration, optionally a preset that states the model. Out: `ImportSource`. Names in the files
vary: layers are stacked ("decoder.layers.mlp…", layer first) or numbered, experts too; norms have the names of Transformer
Engine's fused layers; a gated linear layer may be two tensors, _w and _v.

Torch-free.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import load_config
from configs.model_schema import Model
from configs.sources import find_file
from pretrain.run.files import read_json
from tools.convert.megatron_lm.arguments import read_args
from tools.convert.megatron_lm.pickles import MALFORMED, load
from tools.convert.megatron_lm.torch_dist import COMMON, METADATA, TorchDist, common_state
from tools.convert.tensors.canonical_shapes import tensor_shapes
from tools.convert.tensors.import_source import ImportSource, check_model
from tools.convert.tensors.row_mappings import RowMapping
from tools.convert.tensors.weight_map import TensorPart, WeightMap, audit

TRACKER = "latest_checkpointed_iteration.txt"
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
_SHOWN = 8
_NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")
# Canonical name -> name of Transformer Engine's fused norm. Files hold either.
_FUSED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)


def is_megatron(folder: Path) -> bool:
    """Whether the folder looks like a Megatron-LM checkpoint, in any of its formats."""
    marks = (METADATA, TRACKER, COMMON)
    return any((folder / mark).exists() for mark in marks) or any(folder.glob("mp_rank_*"))


def open_megatron(folder: Path, preset: str | None) -> ImportSource:
    """Read and check everything of a torch_dist checkpoint except the numbers. Raises ConfigError with all problems."""
    place = _iteration(folder)
    model, notes = _model(place, preset)
    problems = check_model(model, "this model can't be imported; where another one was meant: --model PRESET|YAML")
    if problems:
        raise ConfigError(problems)
    model.name, model.source = folder.resolve().name, "imported from a Megatron-LM torch_dist checkpoint"
    files = TorchDist(place)
    weight_map, problems = _weight_map(model, files)
    for name in weight_map.hf_shapes:
        problems += files.check(name)
    left = sorted(name for name in files.tensors if name not in weight_map.hf_shapes and not name.startswith(_NOT_WEIGHTS))
    if left:
        rule = f"must hold only tensors of the model; these {len(left)} have no place in it and would be lost"
        problems.append(Problem(str(place), left[:_SHOWN], rule, "state the right model: --model PRESET|YAML"))
    if problems:
        raise ConfigError(problems)
    if any(name.startswith(_NOT_WEIGHTS) for name in files.tensors):
        notes.append("the optimizer state was not imported: a run that starts from this import has a fresh optimizer")
    # The real path: shards of one conversion may name the folder in different ways.
    identity = [os.path.realpath(place), *map(str, files.tensors), *map(str, files.tensors.values())]
    return ImportSource(place, "megatron-lm", model, files, weight_map, identity, len(weight_map.hf_shapes), False, notes)


def _iteration(folder: Path) -> Path:
    """The folder of one iteration. Raises ConfigError when there is none, or when its format isn't torch_dist."""
    place = folder
    if not (folder / METADATA).exists() and (folder / TRACKER).is_file():
        word = (folder / TRACKER).read_text(errors="replace").strip()
        place = folder / _iteration_name(word)
        if not place.is_dir():
            raise ConfigError(Problem(str(folder / TRACKER), word, f"{place.name} must be there", "name an iteration's folder"))
    fix = "load it in Megatron-LM and save it with --ckpt-format torch_dist"
    if any(place.glob("mp_rank_*")):
        rule = "must be torch_dist: the older format is a pickle a rank, which runs code when it is loaded"
        raise ConfigError(Problem(str(place), "mp_rank_*", rule, fix))
    said = read_json(place / "metadata.json")
    backend = said.get("sharded_backend") if isinstance(said, dict) else None
    if backend not in (None, "torch_dist"):
        raise ConfigError(Problem(str(place / "metadata.json"), backend, "sharded_backend must be torch_dist", fix))
    return place


def _iteration_name(word: str) -> str:
    """The folder name of what the tracker file says: "release", or an iteration's number."""
    if word == "release":
        return "release"
    return f"iter_{int(word):07d}" if word.isdecimal() else "iter_?"


def _model(place: Path, preset: str | None) -> tuple[Model, list[str]]:
    """(model, notes) of the preset, else of the saved arguments. Raises ConfigError."""
    if preset is not None:
        found = f"model/{preset}" if find_file(preset, Path.cwd()) is None else preset
        model = load_config(found).config.model
        if model.vocab_size is None:
            rule = "must be stated: the number of real tokens"
            raise ConfigError(Problem("--model: model.vocab_size", None, rule, "state it in the preset"))
        return model, []
    args = _saved_args(place)
    model, problems, notes = read_args(args)
    if problems:
        raise ConfigError(problems)
    return model, notes


def _saved_args(place: Path) -> dict[str, Any]:
    path, fix = place / COMMON, "state the model: --model PRESET|YAML"
    try:
        saved = common_state(place)
        if saved is None:
            raise ConfigError(Problem(str(path), "missing", "holds the arguments of the run", fix))
        with zipfile.ZipFile(io.BytesIO(saved)) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            raw = archive.read(name)
    except FileNotFoundError as error:
        raise ConfigError(Problem(str(error.filename), "missing", "holds the arguments of the run", fix)) from error
    except (zipfile.BadZipFile, OSError, *MALFORMED) as error:
        raise ConfigError(Problem(str(path), "damaged", f"must be written by torch.save: {error}", fix)) from error
    common = load(raw, str(path))
    if isinstance(common, list) and len(common) == 1:
        # The form of an object in a .distcp file.
        (common,) = common
    args = common.get("args") if isinstance(common, dict) else None
    values = getattr(args, "state", None)
    if not isinstance(values, dict):
        raise ConfigError(Problem(f"{path}: args", None, "must be there, as Megatron-LM saves them", fix))
    return values


def _weight_map(model: Model, files: TorchDist) -> tuple[WeightMap, list[Problem]]:
    """The row mappings of every canonical tensor, and problems for missing tensors and wrong shapes."""
    shapes = tensor_shapes(model)
    by_canonical: dict[TensorPart, list[RowMapping]] = {}
    by_hf: dict[TensorPart, list[RowMapping]] = {}
    missing, problems = [], []
    for name, shape in shapes.items():
        leads = [(index,) for index in range(shape[0])] if ".mlp.experts." in name else [()]
        for lead in leads:
            mappings = _row_mappings(name, lead, shape, files, model)
            if not mappings:
                missing.append(name)
            for mapping in mappings:
                problems += _check_shape(mapping, shape, files)
                by_hf.setdefault((mapping.hf_name, mapping.hf_lead), []).append(mapping)
            by_canonical[(name, lead)] = mappings
    fix = "state the right model: --model PRESET|YAML"
    if missing:
        names = list(dict.fromkeys(missing))
        rule = f"must hold every tensor of the model; {len(names)} are missing"
        problems.insert(0, Problem(str(files.folder), names[:_SHOWN], rule, fix))
    weight_map = WeightMap(shapes, by_canonical, by_hf, {name: files.shape(name) for name, _ in by_hf})
    if not problems:
        audit(weight_map, model)
    return weight_map, list({(problem.path, problem.rule): problem for problem in problems}.values())


def _row_mappings(name: str, lead: tuple[int, ...], shape: tuple[int, ...], files: TorchDist, model: Model) -> list[RowMapping]:
    """The rows of the files that fill a canonical tensor, or one expert of it. Empty when the files don't hold it."""
    rows = shape[len(lead)] if name not in TABLES else model.vocab_size or 0
    for key, place in _candidates(name, lead):
        if key in files.tensors:
            return [RowMapping(name, lead, 0, rows, key, place)]
        if key + "_w" in files.tensors and key + "_v" in files.tensors:
            half = rows // 2
            return [RowMapping(name, lead, 0, half, key + "_w", place), RowMapping(name, lead, half, half, key + "_v", place)]
    return []


def _candidates(name: str, lead: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name in the files, index into its leading dims) of each form in which a tensor may be saved."""
    match = re.fullmatch(r"((?:decoder|mtp)\.layers\.)(\d+)\.(.+)", name)
    if not match:
        yield name, lead
        return
    stack, layer, inner = match[1], int(match[2]), match[3]
    prefix, dot, tail = inner.partition("transformer_layer.")
    prefixes: tuple[str, ...] = ("",)
    if dot:
        prefixes = () if prefix else ("transformer_layer.", "mtp_model_layer.")
    for head in prefixes:
        for own in _names(tail if dot else inner):
            yield f"{stack}{layer}.{head}{own}", lead
            if not head:
                yield f"{stack}{own}", (layer, *lead)
            if lead:
                numbered = own.replace("mlp.experts.experts.", f"mlp.experts.experts.{lead[0]}.")
                yield f"{stack}{layer}.{head}{numbered}", ()
                if not head:
                    yield f"{stack}{numbered}", (layer,)


def _names(inner: str) -> Iterator[str]:
    """The name of a layer's tensor, and its name as a norm that is fused with the next linear layer."""
    own = inner.replace("mlp.experts.", "mlp.experts.experts.")
    yield own
    for unfused, fused in _FUSED:
        if own.startswith(unfused):
            yield own.replace(unfused, fused)


def _check_shape(mapping: RowMapping, shape: tuple[int, ...], files: TorchDist) -> Iterator[Problem]:
    """A problem when the tensor in the files lacks the rows or columns of the model. Tables may have more rows: padding."""
    got, depth = files.shape(mapping.hf_name), len(mapping.hf_lead)
    wanted = (mapping.rows, *shape[len(mapping.lead) + 1 :])
    fits = len(got) == depth + len(wanted) and got[depth + 1 :] == wanted[1:] and all(a < b for a, b in zip(mapping.hf_lead, got))
    padded = fits and mapping.name in TABLES and got[depth] >= wanted[0]
    if not (fits and got[depth] == wanted[0]) and not padded:
        rule = f"must be of shape {[*('layers', 'experts')[:depth], *wanted]} by the model"
        yield Problem(mapping.hf_name, list(got), rule, "state the right model: --model PRESET|YAML")
