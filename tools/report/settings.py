"""The settings of a run for the page. In: the run folder. Out: values with their origin, what attempts changed, a plan.

Files of another version of Phalanx, or of another tool, are told in `problem`; the rest of the page stays.

Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from configs.errors import ConfigError, Problem
from configs.load import from_yaml_text
from configs.schema import Config
from configs.secrets import shown
from configs.sources import parse_yaml
from parallel.layout import make_layout
from parallel.legality.verdict import check_config
from parallel.memory.job import make_job
from pretrain.data.tokenizer import vocab_size
from pretrain.run.files import read_json
from pretrain.run.folder import RunFolder
from tools.draw_grid import draw_grid
from tools.draw_pipeline import draw_pipeline
from tools.planner.planning import make_plan
from tools.planner.step_cost import WORDS

_MOST_ATTEMPTS, _MOST_KEYS, _MOST_CHARS = 60, 2000, 400
# No config is as large.
_MOST_BYTES = 1 << 20
_DEGREES = "parallel."


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _flatten(value, f"{prefix}.{name}" if prefix else str(name))
        return
    text = tree if isinstance(tree, str) else json.dumps(tree, default=str)
    yield prefix[:_MOST_CHARS], text if len(text) <= _MOST_CHARS else text[: _MOST_CHARS - 1] + "…"


def _values(data: bytes, name: str) -> dict[str, str]:
    """Dotted key → value as text. Raises ConfigError."""
    tree, _, problems = parse_yaml(data.decode(errors="replace"), name)
    if problems:
        raise ConfigError(problems)
    return dict(list(_flatten(shown("", tree)))[:_MOST_KEYS])


def _read(path: Any) -> bytes:
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ConfigError(Problem(path.name, f"more than {_MOST_BYTES} bytes", "must be a config", "look into the file"))
    return data


def settings(folder: RunFolder) -> dict[str, Any]:
    """`values`: [key, value, origin]. `changes`: what each attempt changed, [attempt, [[key, before, after]]]. Raises OSError."""
    changes: list[tuple[int, list[list[str | None]]]] = []
    before_data, before = b"", {}
    attempts = [n for n in folder.claimed_attempts() if (folder.launch_dir(n) / "config.yaml").exists()][-_MOST_ATTEMPTS:]
    try:
        for number in attempts:
            data = _read(folder.launch_dir(number) / "config.yaml")
            if data == before_data:
                continue
            values = _values(data, f"attempt_{number:04d}/config.yaml")
            if before:
                keys = [key for key in {**before, **values} if before.get(key) != values.get(key)]
                changes.append((number, [[key, before.get(key), values.get(key)] for key in keys]))
            before_data, before = data, values
        values = _values(_read(folder.config), "config.yaml") if folder.config.exists() else before
    except ConfigError as error:
        return {"values": [], "changes": changes, "problem": f"{error.problems[0].path}: {error.problems[0].rule}"}
    provenance = read_json(folder.provenance)
    known = provenance if isinstance(provenance, dict) else {}
    origin, packages = (found if isinstance(found := known.get(name), dict) else {} for name in ("origin", "packages"))
    rows = [[key, value, str(origin.get(key, ""))[:_MOST_CHARS]] for key, value in values.items()]
    software = {str(name)[:80]: str(value)[:80] for name, value in packages.items() if value}
    code = {"code": str(known.get("code_version", ""))[:80], "python": str(known.get("python", ""))[:80]}
    return {"values": rows, "changes": changes, "software": {**code, **software}}


def changed_layouts(changes: list[tuple[int, list[list[str | None]]]]) -> dict[int, str]:
    """Attempt → what it changed of the layout, in words."""
    found = {}
    for number, keys in changes:
        words = [f"{key.removeprefix(_DEGREES)} {old} → {new}" for key, old, new in keys if key and key.startswith(_DEGREES)]
        if words:
            found[number] = ", ".join(words)
    return found


def read_config(folder: RunFolder) -> Config | str:
    """The config, or why it can't be read. Raises OSError."""
    if not folder.config.exists():
        return "no attempt has begun: there is no config.yaml yet"
    try:
        config = from_yaml_text(_read(folder.config).decode(errors="replace"), "config.yaml")
        if problems := check_config(config).problems:
            raise ConfigError(problems)
    except ConfigError as error:
        return f"{error.problems[0].path}: {error.problems[0].rule}"
    return config


def layout_and_plan(config: Config | str) -> dict[str, Any]:
    """Drawings of the layout, and the planner's memory and time for it; or `problem`."""
    if isinstance(config, str):
        return {"problem": config}
    layout = make_layout(config)
    document: dict[str, Any] = {"words": layout.describe(), "ranks": layout.world_size, "grid": draw_grid(layout)}
    try:
        job = make_job(config, vocab_size(config))
    except ConfigError as error:
        return document | {"pipeline": [], "problem": f"no plan: {error.problems[0].path}: {error.problems[0].rule}"}
    pipeline = draw_pipeline(layout.pipeline, layout.virtual_pipeline, int(job.num_micro_batches))
    return document | {"pipeline": pipeline, **plan_document(make_plan(job).as_dict(), job.machine.gpu.name)}


def plan_document(plan: dict[str, Any], gpu: str) -> dict[str, Any]:
    """Memory by stage and time by part, as the page draws them."""
    breakdown = {WORDS.get(kind, kind): value for kind, value in plan["time"]["breakdown_s"].items() if value}
    return {"memory": plan["memory"], "time": plan["time"] | {"breakdown_s": breakdown}, "gpu": gpu, "fits": plan["fits"]}
