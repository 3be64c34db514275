"""Element types of tensor files in numpy: bf16 as 16-bit words, fp8 and MXFP4 dequantized. No torch, which takes 250 MB.

Formats: bf16 is the upper half of fp32. fp8 E4M3FN (arXiv 2209.05433) comes in 128 x 128 blocks with one fp32 factor each
(DeepSeek-V3). MXFP4 (OCP Microscaling 1.0) is E2M1 in blocks of 32 with one power of two each, low nibble first (gpt-oss).

Torch-free.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FLOATS = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}
RAW = {**FLOATS, "F8_E4M3": np.dtype("u1"), "U8": np.dtype("u1"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4")}
NAMES = {"bf16": "BF16", "fp32": "F32", "fp16": "F16"}
"""Names on the command line -> names in the files."""


def to_float32(values: Array, dtype: str) -> NDArray[np.float32]:
    """Values as fp32. Exact for every type but F64."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def from_float32(values: NDArray[np.float32], dtype: str) -> Array:
    """fp32 values in another type: rounded to nearest, ties to even. NaN stays NaN."""
    if dtype != "BF16":
        return values.astype(FLOATS[dtype], copy=False)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    not_a_number = np.isnan(values)
    if not_a_number.any():
        rounded[not_a_number] = 0x7FC0
    return rounded


def convert(values: Array, source: str, target: str) -> Array:
    """Values of element type `source` as element type `target`."""
    if source == target:
        return values
    if source == "F64" and target != "BF16":
        return values.astype(FLOATS[target])
    return from_float32(to_float32(values, source), target)


def widest(dtypes: set[str]) -> str:
    """The type that holds the values of all `dtypes`."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "F64" if "F64" in dtypes else "F32"


def _e4m3_table() -> NDArray[np.float32]:
    codes = np.arange(256, dtype=np.int64)
    sign, exponent, mantissa = np.where(codes & 0x80, -1.0, 1.0), (codes >> 3) & 0xF, codes & 0x7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    values = sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[(codes & 0x7F) == 0x7F] = np.nan
    return values.astype(np.float32)


E4M3 = _e4m3_table()
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)
E2M1 = np.concatenate([_E2M1, -_E2M1])


def dequantize_fp8(codes: NDArray[np.uint8], factors: NDArray[np.float32], first_row: int, block: tuple[int, int]) -> Array:
    """codes [rows, columns], from row `first_row` of the tensor on -> bf16 words [rows, columns].

    factors [row blocks, column blocks] belong to the whole tensor. The product fp8 x fp32 is computed in fp32 and rounded
    once, which gives the same bits as DeepSeek's own cast.
    """
    rows, columns = codes.shape
    result = np.empty((rows, columns), dtype=np.uint16)
    start = 0
    while start < rows:
        row_block = (first_row + start) // block[0]
        stop = min(rows, (row_block + 1) * block[0] - first_row)
        wide = np.repeat(factors[row_block], block[1])[:columns]
        result[start:stop] = from_float32(E4M3[codes[start:stop]] * wide, "BF16")
        start = stop
    return result


def dequantize_mxfp4(blocks: NDArray[np.uint8], exponents: NDArray[np.uint8]) -> Array:
    """blocks [rows, groups, 16], exponents [rows, groups] (bias 127) -> bf16 words [rows, groups x 32]. Exact."""
    rows, groups, half = blocks.shape
    values = np.empty((rows, groups, half, 2), dtype=np.float32)
    values[..., 0] = E2M1[blocks & 0x0F]
    values[..., 1] = E2M1[blocks >> 4]
    scaled = np.ldexp(values.reshape(rows, groups, 2 * half), exponents.astype(np.int32)[..., None] - 127)
    return from_float32(scaled.reshape(rows, groups * 2 * half), "BF16")
