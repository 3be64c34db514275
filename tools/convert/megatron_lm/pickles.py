"""Pickles of torch and Megatron-LM as plain values, without running any code that they name.

In: bytes. Out: dicts, lists, numbers, and a `StandIn` wherever the pickle names a class or function of the allow-list. A
stand-in keeps the name, the arguments and the state, and does nothing. Any other name is refused before an object is made.

Torch-free.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from functools import cache
from typing import Any

from configs.errors import ConfigError, Problem

_HARMLESS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    **{(module, name): kind for module in ("builtins", "__builtin__")
       for name, kind in (("set", set), ("frozenset", frozenset), ("slice", slice), ("complex", complex))},
}  # fmt: skip
_STAND_INS = {
    ("argparse", "Namespace"), ("types", "SimpleNamespace"), ("signal", "Signals"), ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("torch.serialization", "_get_layout"),
    ("numpy", "dtype"), ("numpy", "ndarray"), ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("_codecs", "encode"),
    ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib", "Path"), ("datetime", "timedelta"),
    # An enum's member as some releases of Python 3.11 write it: getattr(class, name). A stand-in looks nothing up.
    ("builtins", "getattr"),
}  # fmt: skip
_DTYPES = {
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8", "uint8",
    "bool", "half", "double", "float",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ByteStorage": "U8",
}  # fmt: skip
# Classes of these packages carry settings and offsets only. With stand-ins, none of the packages has to be installed.
_PACKAGES = ("torch.distributed.checkpoint.", "megatron.core.", "megatron.training.")

MALFORMED = (
    pickle.UnpicklingError, AttributeError, TypeError, ValueError, EOFError, LookupError, ImportError, OverflowError,
    RecursionError, MemoryError,
)  # fmt: skip
"""Exceptions of Python's unpickler for bytes that are not a pickle, or a damaged one."""


class StandIn:
    """What a pickle says about an object.

    `origin`: the name of its class or function. `args`: the constructor's arguments. `state`: its state; the items of a dict
    are attributes, too.
    """

    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})

    args: tuple[Any, ...]
    state: Any


@cache
def _stand_in(module: str, name: str) -> type[StandIn]:
    return type(name.rpartition(".")[2], (StandIn,), {"origin": f"{module}.{name}"})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = (module_name, global_name)
        if name in _HARMLESS:
            return _HARMLESS[name]
        known = module_name == "torch" and global_name in _DTYPES | _STORAGES.keys()
        if known or name in _STAND_INS or f"{module_name}.".startswith(_PACKAGES):
            return _stand_in(*name)
        raise pickle.UnpicklingError(f"names {module_name}.{global_name}, which is not on the list of what may be there")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load(raw: bytes, path: str) -> Any:
    """The value of a pickle. Raises ConfigError, naming `path`, for a damaged pickle and for names that the allow-list lacks."""
    try:
        return _Unpickler(io.BytesIO(raw)).load()
    except MALFORMED as error:
        rule = f"must be a pickle of torch and Megatron-LM that runs no code: {str(error)[:200]}"
        raise ConfigError(
            Problem(path, "refused", rule, "don't trust this file; save it again with --ckpt-format torch_dist")
        ) from error


def storage_dtype(storage: Any) -> str | None:
    """Element type (F32, BF16, …) of a storage that a pickle names; None for anything else."""
    origin = getattr(storage, "origin", "")
    return _STORAGES.get(origin.removeprefix("torch.")) if origin.startswith("torch.") else None
