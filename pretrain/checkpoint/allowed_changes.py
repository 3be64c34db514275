"""The config keys that a resume may change. In: the configs before and now. Out: problems. The longest matching prefix counts.

free: the key changes speed, places or display, or the length of the run, and none of the numbers.
word: the key changes what is learned. A change is allowed when checkpoint.allow_change names the key or its section.
refused: the key makes another model, whose weights don't fit or have another meaning.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from configs.errors import Problem
from configs.fields import walk
from configs.model_schema import Model
from configs.optimizer_schema import Optimizer
from configs.schema import Config

FREE, WORD, REFUSED = "free", "word", "refused"

TABLE: dict[str, str] = {
    "run": FREE,
    "run.seed": WORD,
    "parallel": FREE,
    "zero": FREE,
    "recompute": FREE,
    "checkpoint": FREE,
    "divergence": FREE,
    "metrics": FREE,
    "launch": FREE,
    "cluster": FREE,
    "precision": WORD,
    "batch": WORD,
    "batch.micro_batch_seqs": FREE,
    "optimizer": WORD,
    "schedule": WORD,
    "data": WORD,
    "data.cache_dir": FREE,
    # Tokenizer and training data are compared by content, so their paths may change. Another tokenizer is refused, other data
    # needs the user's word.
    "data.tokenizer": FREE,
    "data.train": FREE,
    "data.valid": FREE,
    "data.valid_sets": FREE,
    "data.phases": FREE,
    "data.max_epochs": FREE,
    "model": REFUSED,
    "model.name": FREE,
    "model.source": FREE,
    "model.planning_only": FREE,
    "model.init_std": FREE,
    "model.scale_init_by_depth": FREE,
    # The longest context: positions that a run grows into. Manifests keep these keys, since the outputs depend on them.
    "model.max_position_tokens": WORD,
    "model.position.theta": WORD,
    "model.position.scaling": WORD,
    "model.mup": WORD,
    "model.hidden_dropout": WORD,
    "model.attention.dropout": WORD,
    "model.mtp.loss_coeff": WORD,
    "model.moe.dispatcher": FREE,
    "model.moe.grouped_gemm": FREE,
    "model.moe.shared_overlap": FREE,
    "model.moe.capacity_factor": WORD,
    "model.moe.pad_to_capacity": WORD,
    "model.moe.drop_policy": WORD,
    "model.moe.router.balance": WORD,
    "model.moe.router.aux_loss_coeff": WORD,
    "model.moe.router.z_loss_coeff": WORD,
    "model.moe.router.jitter_eps": WORD,
    "model.moe.router.expert_bias_update_rate": WORD,
}


CONTEXT = ("max_position_tokens", "position.theta", "position.scaling")
"""Keys and sections of `model` that change the positions, and with them the outputs of the same weights."""


def rule_of(key: str) -> str:
    """The rule of a dotted key: free, word or refused."""
    parts = key.replace("[", ".").split(".")
    for length in range(len(parts), 0, -1):
        if rule := TABLE.get(".".join(parts[:length])):
            return rule
    raise KeyError(f"the resume table has no rule for {key}")


def architecture(model: Model, vocab_size: int) -> dict[str, Any]:
    """The keys of `model` on which weights or outputs depend, and the vocabulary size in use. A manifest keeps them."""
    keys = {path: value for path, value, _ in walk(model) if rule_of(f"model.{path}") == REFUSED or is_named(path, CONTEXT)}
    return keys | {"vocab_size": vocab_size}


def is_allowed(key: str, allowed: Sequence[str], learned_positions: bool) -> bool:
    """Whether `allowed` lets a key with the rule `word` change. A table of learned positions can't grow."""
    return rule_of(key) == WORD and is_named(key, allowed) and not (learned_positions and key == "model.max_position_tokens")


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf key of a nested config, dotted, with its value."""
    return {path: value for path, value, _ in walk(config)}


def has_same_optimizer(written: Mapping[str, Any], optimizer: Optimizer) -> bool:
    """Whether the optimizer state of a checkpoint is that of `optimizer`. `written`: the config in the manifest."""

    def updaters(section: Mapping[str, Any]) -> tuple[Any, Any]:
        kind = section.get("kind", "adamw")
        return kind, section["muon"]["router"] if kind == "muon" else None

    return updaters(written.get("optimizer", {})) == updaters(asdict(optimizer))


def is_named(key: str, allowed: Sequence[str]) -> bool:
    """Whether `allowed` contains the key or a section that contains it."""
    plain = key.replace("[", ".").replace("]", "")
    return any(plain == name or plain.startswith(name + ".") for name in allowed)


def check_changes(before: dict[str, Any], config: Config) -> list[Problem]:
    """The changes since the attempt whose flattened config was `before` that this config may not make."""
    now = flatten(config)
    problems = []
    for key in sorted(set(before) & set(now)):
        old, new = before[key], now[key]
        rule = rule_of(key)
        learned = config.model.position.kind == "learned"
        if old == new or rule == FREE or is_allowed(key, config.checkpoint.allow_change, learned):
            continue
        # A horizon that is unset now is taken from the run itself.
        if key == "schedule.horizon_steps" and new is None:
            continue
        if rule == WORD and not (learned and key == "model.max_position_tokens"):
            section = key.replace("[", ".").split(".")[0]
            text = f"was {old!r} when the run stopped; a change needs your word, since it changes what is learned"
            fix = f"set it back, or add checkpoint.allow_change=[{key}] (or [{section}])"
        else:
            text = f"was {old!r} when the run stopped; another architecture can't go on from its weights"
            fix = "set it back, or start another run with its own run.name"
        problems.append(Problem(key, new, text, fix))
    return problems


def check_data_change(before: dict[str, Any] | None, now: dict[str, Any], config: Config) -> list[Problem]:
    """Problems when the training data differs in content from that of the checkpoint, whose sample counter refers to it."""

    def content(identity: dict[str, Any]) -> list[Any]:
        phases = [(phase["from_tokens"], blend(phase["train"])) for phase in identity.get("phases", ())]
        return [identity["valid_fraction"], blend(identity["train"]), phases]

    def blend(parts: list[dict[str, Any]]) -> list[Any]:
        return [(part["idx_sha256"], part["weight"]) for part in parts]

    if before is None or content(before) == content(now) or is_named("data.train", config.checkpoint.allow_change):
        return []
    if content(before)[:2] == content(now)[:2]:
        if is_named("data.phases", config.checkpoint.allow_change):
            return []
        rule = "must be the phases of the checkpoint; a change needs your word, since it changes what is learned"
        fix = "set them back, or add checkpoint.allow_change=[data.phases]"
        return [Problem("data.phases", [phase["from_tokens"] for phase in now["phases"]], rule, fix)]
    names = ", ".join(f"{part['name']} ({part['num_tokens']:,} tokens, weight {part['weight']:g})" for part in before["train"])
    rule = f"must be the data of the checkpoint: {names}; the order of samples would be another from here on"
    fix = "name that data again, or add checkpoint.allow_change=[data]"
    return [Problem("data.train", [part["name"] for part in now["train"]], rule, fix)]
