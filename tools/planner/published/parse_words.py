"""What people write in a row, as what the rows' format means.

In: a row as it came. Out: the same with numbers as numbers; recomputation and ZeRO by their words; a preset by its name.

Torch-free.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import configs
from configs.load import load_config
from configs.model_schema import Model
from parallel.memory.job import Recomputation

PRESETS = Path(configs.__file__).parent / "model"
NUMBER = re.compile(r"\s*[+-]?\d[\d,_]*(\.\d+)?\s*")
# Words for all of it and for none of it, where no module is named.
FULL = re.compile(r"\b(full|uniform|every layer|all layers|true|yes|on|enabled|checkpointing|activation recomputation)\b")
NONE = re.compile(r"\b(none|no|off|false|disabled|without)\b|\[\]")
MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "shared_experts", "moe")
UNSAID = ("not stated", "HEAD recipe", "none set")


def _number_of_text(value: Any) -> Any:
    """A number that was written as text."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        number = float(re.sub(r"[,_\s]", "", value))
        return int(number) if number == int(number) else number
    return value


def with_typed_values(row: dict[str, Any], texts: tuple[str, ...]) -> dict[str, Any]:
    """The row with numbers as numbers, a model's name as a model, and `texts` as text where a number or yes/no stands."""
    row = {name: value if name in texts else _number_of_text(value) for name, value in row.items()}
    if isinstance(row.get("model"), str):
        row["model"] = {"name": row["model"]}
    for section in ("model", "measured", "derived"):
        if isinstance(row.get(section), dict):
            row[section] = {name: _number_of_text(value) for name, value in row[section].items()}
    if isinstance(row.get("recompute"), bool):
        row["recompute"] = "full" if row["recompute"] else "none"
    if isinstance(row.get("zero"), int) and not isinstance(row["zero"], bool) and 0 <= row["zero"] <= 3:
        row["zero"] = f"zero-{row['zero']}" if row["zero"] else "none"
    return row


def zero_stage(text: str) -> int | None:
    """The stage that a row's `zero` names, None when it names none. "zero-2 style" gradients are summed up like stage 1's."""
    if "fsdp" in text or "hsdp" in text:
        return 2 if "shard_grad_op" in text else 3
    if text.startswith(("none", "ddp")):
        return 0
    found = re.search(r"(?:zero|stage)[ _-]{0,3}([0-3])", text)
    if found is None:
        return 2 if "shard_grad_op" in text else None
    return 1 if found[1] == "2" and "style" in text else int(found[1])


def wide_layers(precision: str) -> int:
    """How many of the last layers stay in bf16: of words as "nvfp4 (layers 0-26), bf16 (27-31, head)"."""
    found = re.search(r"bf16 \((\d+)-(\d+)", precision)
    return int(found[2]) - int(found[1]) + 1 if found else 0


def recompute_of(text: str | None, model: Model, pipeline: int) -> Recomputation | None:
    """What the words say, None when they say nothing that we know."""
    if text is None or any(words in text for words in UNSAID):
        return None
    words = text.lower()
    if words.startswith("full"):
        return Recomputation("full")
    if words in ("selective ac", "per-op sac", "selective (per op)", "unknown (config default)"):
        # torchtitan: every second layer, or every second product and all grouped ones.
        if model.moe.num_experts:
            return Recomputation("selective", frozenset({"layernorm", "moe", "shared_experts"}))
        return Recomputation("full", frozenset(), "block", -(-model.num_layers // 2 // pipeline))
    modules = {name for name in MODULES if re.search(rf"\b{name}\b", words)}
    if "core attention" in words or "attention only" in words or words.startswith("selective + sequence"):
        modules |= {"core_attn"}
    if modules:
        return Recomputation("selective", frozenset(modules))
    block = re.search(r"\bblock\b\D*(\d+)", words)
    if block and int(block[1]) >= 1:
        return Recomputation("full", frozenset(), "block", int(block[1]))
    if NONE.search(words):
        return Recomputation()
    if words.startswith("selective"):
        return Recomputation("selective", frozenset({"core_attn"}))  # Megatron's default
    return Recomputation("full") if FULL.search(words) else None


def _key(name: str) -> str:
    """Llama-3 70B, LLAMA3_70B and Llama 3.1 70B are one."""
    name = re.sub(r"llama[-_ ]?3\.[0-3](?!\d)", "llama3", name.lower())
    return re.sub(r"[^a-z0-9]", "", name)


@cache
def preset_of(name: str) -> tuple[Model, int] | None:
    """(model, vocabulary) of the shipped preset of this name, None when none or more than one could be meant."""
    key = _key(name)
    stems = {_key(path.stem): path.stem for path in sorted(PRESETS.glob("*.yaml"))}
    known = [stem for stem in stems if key.startswith(stem)]  # DeepSeek-V3 (671B-A37B)
    if not known and len(key) > 5:
        known = [stem for stem in stems if stem.startswith(key)]  # Qwen3-235B
        known = known if len(known) == 1 else []
    if not known:
        return None
    model = load_config(f"model/{stems[max(known, key=len)]}").config.model
    return (model, model.vocab_size) if model.vocab_size else None
