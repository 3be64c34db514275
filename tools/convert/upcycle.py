"""Dense Hugging Face model -> MoE checkpoint that computes the same logits (sparse upcycling, arXiv 2212.05055).

In: the folder of a dense model with SwiGLU MLPs, number of experts, top-k, granularity. Out: a checkpoint of weights, as an
import makes it, of a model that some family of Hugging Face can hold.

Every expert starts as the dense MLP. The weights of the chosen experts sum to 1, so the layer's output is the MLP's, whichever
experts are chosen. The router starts with small random weights. With a granularity G > 1 each copy is cut into G experts of
1 / G of the width, and G times top-k experts are chosen. The G parts of a copy have the same router weights, so that they are
chosen together (virtual groups, arXiv 2410.07524), and each weighs 1 / G of its copy: their down projections are multiplied by
G. A shared expert is another copy; it and the routed experts then count one half each.

Torch-free.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError, Problem
from configs.model_schema import Model
from parallel import architecture as arch
from pretrain.checkpoint.tensor_file import DamagedFile
from tools.convert.families import FAMILIES, family_for
from tools.convert.file_plan import PlannedTensor, WriteUnit, plan_files
from tools.convert.importing import FILE_BYTES, complete_checkpoint, cut_slices, element_types, fill_canonical_tensor
from tools.convert.importing import open_huggingface as open_dense
from tools.convert.output_folder import OutputFolder, WorkShare, check_output_path
from tools.convert.overflow import check_range
from tools.convert.tensors.canonical_shapes import tensor_shapes
from tools.convert.tensors.dtypes import FLOATS, NAMES, Array, from_float32, to_float32
from tools.convert.tensors.import_source import ImportSource, check_model
from tools.convert.tokenizer_files import companion_files

_ROUTED, _SHARED = ".mlp.experts.", ".mlp.shared_experts."


@dataclass(frozen=True)
class Recipe:
    """`num_experts` copies of the MLP of which `top_k` are chosen; each is cut into `granularity` experts.

    `noise`: standard deviation of normal noise on the weights of routed experts. `seed`: of noise and router.
    """

    num_experts: int
    top_k: int
    granularity: int = 1
    shared_expert: bool = False
    noise: float = 0.0
    seed: int = 0


def upcycle(folder: Path, out: Path, recipe: Recipe, dtype: str, share: WorkShare, workers: int, force: bool) -> dict[str, Any]:
    """Write the MoE checkpoint. Returns the JSON document of `phalanx convert upcycle`. Raises ConfigError."""
    source = open_dense(folder)
    model, family = moe_model(source.model, recipe)
    place = check_output_path(out, folder, force)
    dense_types = element_types(source, dtype)
    shapes = tensor_shapes(model)
    dtypes = {name: dense_types.get(_dense_name(name)) or _router_type(name, dtype) for name in shapes}
    entries = list(_entries(shapes, dtypes))
    files = plan_files(entries, FILE_BYTES, lambda number, count: f"part_{number:05d}.safetensors", {})
    weights = _Weights(source, model, recipe)
    try:
        if dtype != "keep":
            check_range(files, share, workers, weights.fill, has_f64=False)
        output = OutputFolder(place, files, [source.identity, dtype, asdict(recipe)], force)
        written = output.write(share, workers, weights.fill)
    except DamagedFile as error:
        raise ConfigError(Problem(str(source.folder), "damaged", str(error), "copy or download the folder again")) from error
    sizes = {file.name: file.num_bytes for file in files}
    kept = companion_files(folder)
    finished = output.finish(
        share, lambda partial, sums: complete_checkpoint(partial, sums, folder, model, shapes, dtypes, sizes, kept)
    )
    source.files.close()
    notes = [*source.notes, f"the export of this model is of the family {family}"]
    if recipe.noise:
        notes.append("with noise the logits differ from those of the dense model")
    if recipe.granularity & (recipe.granularity - 1) and set(dtypes.values()) - {"F32", "F64"}:
        notes.append(f"a granularity of {recipe.granularity} is no power of two: down projections are rounded once")
    return {
        "out": str(out), "family": family, "finished": finished, "experts": model.moe.num_experts, "top_k": model.moe.top_k,
        "expert_width": model.moe.ffn_hidden_size, "tensors_written": len(shapes), "bytes_written": written, "notes": notes,
    }  # fmt: skip


def moe_model(dense: Model, recipe: Recipe) -> tuple[Model, str]:
    """(MoE model, name of the family that holds it). Raises ConfigError with the reasons when there is none."""
    if problems := list(_wrong(dense, recipe)):
        raise ConfigError(problems)
    model = copy.deepcopy(dense)
    width, moe = arch.ffn(dense), model.moe
    model.name, model.source = f"{dense.name}_moe", f"upcycled from {dense.name}"
    moe.num_experts, moe.top_k = recipe.num_experts * recipe.granularity, recipe.top_k * recipe.granularity
    moe.ffn_hidden_size = width // recipe.granularity
    moe.shared_ffn_hidden_size = width if recipe.shared_expert else None
    moe.router.normalize_top_k = True
    reasons = []
    # In each of these routers the weights of the chosen experts sum to 1.
    for score, gated in (("softmax", recipe.shared_expert), ("sigmoid", False)):
        moe.router.score, moe.shared_gate, moe.router.expert_bias = score, gated, score == "sigmoid"
        try:
            family = family_for(model).name
        except ConfigError as error:
            reasons.append(f"with {score} scores {error.problems[0].rule}")
            continue
        if problems := check_model(model, "upcycle another model, or with other numbers"):
            raise ConfigError(problems)
        return model, family
    rule = f"must become a model that a family can hold (of {len(FAMILIES)}): {' || '.join(reasons)}"
    other = "without" if recipe.shared_expert else "with"
    raise ConfigError(Problem("DENSE", dense.name, rule, f"try it {other} --shared-expert, or another dense model"))


def _wrong(dense: Model, recipe: Recipe) -> Iterator[Problem]:
    width = arch.ffn(dense)
    if dense.moe.num_experts:
        yield Problem("DENSE", dense.name, f"must be dense; it has {dense.moe.num_experts} experts", "name a dense model")
    if dense.mlp_bias:
        yield Problem("DENSE", dense.name, "must have MLPs without biases: no family has them in its experts", "take another one")
    if recipe.num_experts < 2:
        yield Problem("--experts", recipe.num_experts, "must be at least 2", "--experts 8")
    if not recipe.top_k <= recipe.num_experts or recipe.top_k * recipe.granularity < 2:
        rule = f"must lie between 2 and --experts = {recipe.num_experts}: one chosen expert would always weigh 1"
        yield Problem("--top-k", recipe.top_k, rule, "--top-k 2")
    if width % recipe.granularity:
        yield Problem("--granularity", recipe.granularity, f"must divide the width of the MLP, {width}", "--granularity 2")


def _dense_name(name: str) -> str:
    """The dense tensor that a tensor of the MoE model starts from. Routers have none."""
    return name.replace(_ROUTED, ".mlp.").replace(_SHARED, ".mlp.")


def _router_type(name: str, wanted: str) -> str:
    return "F32" if wanted == "keep" or name.endswith("expert_bias") else NAMES[wanted]


def _entries(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]) -> Iterator[PlannedTensor]:
    for name, shape in shapes.items():
        for lead in [(expert,) for expert in range(shape[0])] if _ROUTED in name else [()]:
            yield from cut_slices(name, lead, shape, dtypes[name], (), plain=True)


class _Weights:
    """The values of the MoE model, block by block."""

    def __init__(self, source: ImportSource, model: Model, recipe: Recipe) -> None:
        self.source, self.model, self.recipe = source, model, recipe
        self.width = model.moe.ffn_hidden_size or 0
        half = 0.5 if recipe.shared_expert else 1.0
        self.routed_scale = half * recipe.granularity
        # A gate of zeros weighs one half by itself.
        self.shared_scale = 1.0 if model.moe.shared_gate else half

    def fill(self, unit: WriteUnit, out: Array) -> None:
        """Fill `out` [rows, columns] with the rows of a tensor of the MoE model that `unit` names."""
        if unit.name.endswith("router.weight"):
            copies = range(unit.first, unit.first + unit.rows)
            drawn = [self._drawn(unit.name, row // self.recipe.granularity, out.shape[1]) for row in copies]
            out[...] = from_float32(np.stack(drawn) * np.float32(self.model.init_std), unit.dtype)
        elif unit.name.endswith((".expert_bias", ".gate_weight")):
            out[...] = 0
        elif _ROUTED in unit.name:
            self._fill_routed(unit, out)
        elif _SHARED in unit.name:
            scale = self.shared_scale if "linear_fc2" in unit.name else 1.0
            out[...] = from_float32(self._dense(unit, unit.first, unit.rows) * np.float32(scale), unit.dtype)
        else:
            fill_canonical_tensor(unit, out, self.source.weight_map, self.source.files)

    def _fill_routed(self, unit: WriteUnit, out: Array) -> None:
        part = unit.lead[0] % self.recipe.granularity
        if "linear_fc1" in unit.name:
            # [gate; up] of the part are the rows from part x width on of the dense model's gate, and of its up.
            values = np.empty(out.shape, np.float32)
            for second in (0, 1):
                low, high = max(unit.first, second * self.width), min(unit.first + unit.rows, (second + 1) * self.width)
                if low < high:
                    start = second * self.width * self.recipe.granularity + part * self.width + low - second * self.width
                    values[low - unit.first : high - unit.first] = self._dense(unit, start, high - low)
        else:
            whole = self._dense(unit, unit.first, unit.rows)
            values = whole[:, part * self.width : (part + 1) * self.width] * np.float32(self.routed_scale)
        if self.recipe.noise:
            rows = [self._drawn(f"{unit.name}/{unit.lead[0]}", unit.first + row, out.shape[1]) for row in range(unit.rows)]
            values = values + np.stack(rows) * np.float32(self.recipe.noise)
        out[...] = from_float32(np.ascontiguousarray(values), unit.dtype)

    def _dense(self, unit: WriteUnit, first: int, rows: int) -> NDArray[np.float32]:
        """Rows of the dense tensor that `unit` starts from, in fp32."""
        name = _dense_name(unit.name)
        columns = self.source.weight_map.shapes[name][1]
        dtype = "F32"
        read = WriteUnit(name, (), first, rows, dtype, 0, "", columns * FLOATS[dtype].itemsize, False)
        values = np.empty((rows, columns), FLOATS[dtype])
        fill_canonical_tensor(read, values, self.source.weight_map, self.source.files)
        return to_float32(values, dtype)

    def _drawn(self, name: str, row: int, count: int) -> NDArray[np.float32]:
        """Standard normal values of one row of a tensor, the same however the work is cut."""
        digest = hashlib.sha256(f"{self.recipe.seed}/{name}/{row}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).standard_normal(count, np.float32)
