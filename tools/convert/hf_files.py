"""The tensors of a Hugging Face folder: headers are read at once, numbers by rows. Nothing is ever unpickled.

In: a folder. Out: `HfFiles`, with the shapes and types of all tensors (fp8 and MXFP4 tensors as the bf16 values that they
encode) and the rows of any. All problems of the folder are collected first: missing shards, a wrong index, truncated files,
pickles.

Torch-free.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError, Problem
from pretrain.checkpoint.tensor_file import DamagedFile, TensorEntry, read_header
from pretrain.run.files import read_json
from tools.convert.tensors.dtypes import FLOATS, RAW, Array, dequantize_fp8, dequantize_mxfp4, to_float32

INDEX = "model.safetensors.index.json"
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_REPEATED = re.compile(r"\.rotary_emb\.inv_freq$")
_PACKED = ("F8_E4M3", "U8")
_FACTORS = ("F32", "BF16")
"""DeepSeek's files hold the factors of fp8 blocks in fp32, Qwen's in bf16."""
_READABLE = ("fp8", "mxfp4")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files of ModelOpt, GPTQ and AWQ that describe quantized weights beside an ordinary config.json."""
_LONGEST_NAME_BYTES = 255
"""What file systems allow."""
_LONGEST_SHOWN = 80
_SHOWN = 6
_PROBLEMS = 16


@dataclass(frozen=True)
class HfTensor:
    """One tensor as an import sees it, with the place of its bytes.

    `packing`: None, fp8 or mxfp4; packed tensors appear as the bf16 values that they encode. `with_name`: the tensor of their
    scale factors.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    entry: TensorEntry
    packing: str | None = None
    with_name: str | None = None


class HfFiles:
    """The tensors of a folder. Any number of threads may read at once; they share the open files."""

    def __init__(self, folder: Path, config: Mapping[str, Any], part: str = "", renamed: Sequence[tuple[str, str]] = ()) -> None:
        """`part`: take the tensors whose names begin with it, without it, where there are any. `renamed`: (start of names, start
        in its place).

        Raises ConfigError with every problem of the folder.
        """
        self.folder = folder
        self.raw, problems = _inventory(folder)
        self.num_left_out = 0
        if part and (mine := {name: held for name, held in self.raw.items() if name.startswith(part)}):
            self.num_left_out = len(self.raw) - len(mine)
            self.raw = {name.removeprefix(part): held for name, held in mine.items()}
        self.block, odd = _block_size(config)
        problems += odd
        self.tensors: dict[str, HfTensor] = {}
        self.factors: dict[str, str] = {}
        for name, (file, entry) in self.raw.items():
            if _REPEATED.search(name):
                continue
            stored = self._understood(name, file, entry, problems)
            if stored:
                change = next(((old, new) for old, new in renamed if name.startswith(old)), ("", ""))
                self.tensors[change[1] + name.removeprefix(change[0])] = stored
        if problems:
            raise ConfigError(first_of(problems))
        self._opened: dict[Path, int] = {}
        self._lock = threading.Lock()

    def _understood(self, name: str, file: Path, entry: TensorEntry, problems: list[Problem]) -> HfTensor | None:
        packed = name.removesuffix(_SCALE) if name.endswith(_SCALE) else name.removesuffix(_SCALES) + _BLOCKS
        # Factors of a tensor that isn't packed would change its values. They count as tensors without a place, which are refused.
        if name.endswith((_SCALE, _SCALES)) and packed in self.raw and self.raw[packed][1].dtype in _PACKED:
            self.factors[name] = packed
            return None
        if name.endswith(_BLOCKS) and entry.dtype == "U8" and len(entry.shape) == 4:
            with_name = name.removesuffix(_BLOCKS) + _SCALES
            experts, rows, groups, half = entry.shape
            factors = self.raw.get(with_name)
            if factors is None or factors[1].shape != (experts, rows, groups) or factors[1].dtype != "U8" or half != 16:
                problems.append(
                    _problem(name, list(entry.shape), f"MXFP4 needs U8 {with_name} of shape {[experts, rows, groups]}")
                )
                return None
            return HfTensor((experts, rows, groups * 32), "BF16", file, entry, "mxfp4", with_name)
        if entry.dtype == "F8_E4M3":
            return self._fp8(name, file, entry, problems)
        if entry.dtype not in FLOATS:
            problems.append(_problem(name, entry.dtype, "must be of type " + ", ".join([*FLOATS, "F8_E4M3 with its factors"])))
            return None
        return HfTensor(entry.shape, entry.dtype, file, entry)

    def _fp8(self, name: str, file: Path, entry: TensorEntry, problems: list[Problem]) -> HfTensor | None:
        factors = self.raw.get(name + _SCALE)
        expected = tuple(-(-size // block) for size, block in zip(entry.shape, self.block))
        if len(entry.shape) != 2 or factors is None or factors[1].shape != expected or factors[1].dtype not in _FACTORS:
            got = None if factors is None else [factors[1].dtype, *factors[1].shape]
            kinds = " or ".join(_FACTORS)
            rule = f"fp8 needs {name}{_SCALE}: {kinds} of shape {list(expected)}, a factor for each block of {list(self.block)}"
            problems.append(_problem(name, got, rule))
            return None
        return HfTensor(entry.shape, "BF16", file, entry, "fp8", name + _SCALE)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        return self.tensors[name].dtype

    def read_into(self, name: str, lead: tuple[int, ...], first: int, out: Array) -> None:
        """Fill `out` [rows, columns] with the rows of tensor[lead] from `first` on, in the tensor's type. Packed tensors are
        dequantized.
        """
        stored = self.tensors[name]
        if stored.packing is None:
            self._read(stored.file, stored.entry, lead, first, out)
            return
        assert stored.with_name, "a packed tensor has factors"
        file, entry = self.raw[stored.with_name]
        rows = len(out)
        if stored.packing == "fp8":
            factors = np.empty(entry.shape, dtype=FLOATS[entry.dtype])
            self._read(file, entry, (), 0, factors)
            codes = np.empty(out.shape, dtype=np.uint8)
            self._read(stored.file, stored.entry, lead, first, codes)
            out[...] = dequantize_fp8(codes, to_float32(factors, entry.dtype), first, self.block)
            return
        exponents = np.empty((rows, entry.shape[-1]), dtype=np.uint8)
        self._read(file, entry, lead, first, exponents)
        blocks = np.empty((rows, exponents.shape[1], 16), dtype=np.uint8)
        self._read(stored.file, stored.entry, lead, first, blocks)
        out[...] = dequantize_mxfp4(blocks, exponents)

    def _read(self, file: Path, entry: TensorEntry, lead: tuple[int, ...], first: int, out: Array) -> None:
        """Fill `out` with stored elements of tensor[lead] from row `first` on, in one read. Raises DamagedFile."""
        width = prod(entry.shape[len(lead) + 1 :])
        index = sum(at * prod(entry.shape[dim + 1 :]) for dim, at in enumerate(lead))
        start = entry.start + (index + first * width) * RAW[entry.dtype].itemsize
        read_exactly(self._descriptor(file), out.reshape(-1).view(np.uint8).data, start, file)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._opened:
                self._opened[file] = os.open(file, os.O_RDONLY)
            return self._opened[file]

    def close(self) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)
        self._opened = {}


def read_exactly(descriptor: int, view: memoryview, start: int, file: Path) -> None:
    """Fill `view` with the bytes from `start` on. Raises DamagedFile when the file ends earlier."""
    position = 0
    while position < len(view):
        count = os.preadv(descriptor, [view[position:]], start + position)
        if count == 0:
            raise DamagedFile(f"{file} ends at byte {start + position}")
        position += count


def _problem(name: str, got: Any, rule: str, fix: str = "download the files again, or convert another model") -> Problem:
    return Problem(name, got, rule, fix)


def _block_size(config: Mapping[str, Any]) -> tuple[tuple[int, int], list[Problem]]:
    """(rows, columns) of an fp8 block, with the problem of a wrong value."""
    quantization = config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
    if block is None:
        return (128, 128), []
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return (block[0], block[1]), []
    rule = "must be two sizes from 1 on: rows and columns of a block"
    return (128, 128), [_problem("config.json: weight_block_size", block, rule, "mend the config.json")]


def check_quantization(folder: Path, config: Mapping[str, Any]) -> list[Problem]:
    """A problem for weights that are quantized by a method whose numbers can't be read, by the method's name."""
    problems, fix = [], "convert the model's unquantized folder"
    for name in _QUANTIZATION_FILES:
        if (folder / name).is_file():
            rule = f"must be absent: it says that the weights are quantized; readable are {' and '.join(_READABLE)}"
            problems.append(Problem(str(folder / name), _quantization_of(read_json(folder / name)), rule, fix))
    for key in _QUANTIZATION_KEYS:
        value = config.get(key)
        if not value:
            continue
        method = _quantization_of(value)
        if method not in _READABLE:
            rule = f"the quantization method must be {' or '.join(_READABLE)}: the numbers of others can't be read"
            problems.append(Problem(f"config.json: {key}.quant_method", method, rule, fix))
    return problems


def _quantization_of(value: Any) -> Any:
    """The name of the quantization method: of config.json, or as GPTQ's, AWQ's and ModelOpt's own files give it."""
    if not isinstance(value, Mapping):
        return value
    inner = value.get("quantization")
    where = inner if isinstance(inner, Mapping) else value
    return next((where[key] for key in ("quant_method", "quant_algo", "quant_type", "bits") if key in where), sorted(where)[:6])


def first_of(problems: list[Problem]) -> list[Problem]:
    """The first problems, as many as a person reads. A folder that is wrong throughout has one for every tensor."""
    if len(problems) <= _PROBLEMS:
        return problems
    more = _problem("…", f"{len(problems) - _PROBLEMS} more", "only the first problems are shown", "fix these first")
    return [*problems[:_PROBLEMS], more]


def _inventory(folder: Path) -> tuple[dict[str, tuple[Path, TensorEntry]], list[Problem]]:
    """(file, entry) of every tensor in the folder's safetensors files, by name, and the problems of the files. Raises
    ConfigError.
    """
    index = folder / INDEX
    listed: dict[str, str] | None = None
    if index.exists():
        value = read_json(index)
        weight_map = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ConfigError(_problem(str(index), None, "must be JSON with a weight_map of names to files"))
        listed = weight_map
        names = sorted(set(listed.values()))
        outside = [name[:_LONGEST_SHOWN] for name in names if not _is_plain_name(name)]
        if outside:
            rule = f"must name files of its own folder, by names of at most {_LONGEST_NAME_BYTES} bytes"
            raise ConfigError(_problem(str(index), outside[:_SHOWN], rule))
    else:
        names = _unlisted(folder)
    tensors: dict[str, tuple[Path, TensorEntry]] = {}
    problems = [_problem(str(folder / name), "missing", f"{INDEX} names it") for name in names if not (folder / name).is_file()]
    for name in names:
        if (folder / name).is_file():
            problems += _add_file(folder / name, tensors)
    if listed is not None and not problems:
        absent = sorted(name for name, file in listed.items() if name not in tensors or tensors[name][0].name != file)
        if absent:
            problems.append(
                _problem(str(index), absent[:_SHOWN], f"must name only tensors that the files hold; {len(absent)} are missing")
            )
        extra = sorted(set(tensors) - set(listed))
        if extra:
            problems.append(
                _problem(str(index), extra[:_SHOWN], f"must name every tensor of the files; {len(extra)} are not named")
            )
    return tensors, problems


def _is_plain_name(name: str) -> bool:
    """Whether a file of the folder itself can have this name."""
    fits = 0 < len(name.encode(errors="surrogatepass")) <= _LONGEST_NAME_BYTES
    return fits and "\0" not in name and name not in (".", "..") and Path(name).name == name


def _add_file(path: Path, tensors: dict[str, tuple[Path, TensorEntry]]) -> list[Problem]:
    try:
        header = read_header(path)
    except DamagedFile as error:
        return [_problem(str(path), "damaged", str(error))]
    problems = []
    for name, entry in header.items():
        size = RAW[entry.dtype].itemsize if entry.dtype in RAW else None
        if size is not None and entry.stop - entry.start != prod(entry.shape) * size:
            problems.append(
                _problem(
                    name, entry.stop - entry.start, f"{path.name}: {entry.dtype}{list(entry.shape)} has another number of bytes"
                )
            )
        if name in tensors:
            problems.append(_problem(name, path.name, f"must be in one file only: {tensors[name][0].name} holds it, too"))
        tensors[name] = (path, entry)
    return problems


def _unlisted(folder: Path) -> list[str]:
    """Names of the safetensors files in a folder without an index. Raises ConfigError when there are none."""
    found = sorted(path.name for path in folder.glob("model*.safetensors")) or sorted(
        p.name for p in folder.glob("*.safetensors")
    )
    if found:
        return found
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        rule = "must be safetensors: pickle files run code when they are loaded"
        fix = "where you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        raise ConfigError(Problem(str(folder), pickles[:_SHOWN], rule, fix))
    raise ConfigError(
        _problem(str(folder), "no *.safetensors", "must hold a model's weights", "name the folder of a downloaded model")
    )
