"""Before a launch into a run folder that holds checkpoints: can this config go on from them, and how exactly?

In: a config, its layout and vocabulary. Out: problems as the ranks would refuse with, or where the run goes on.

Torch-free.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from configs.errors import Notice, Problem
from configs.load import from_yaml_text
from configs.schema import Config
from parallel.layout import Layout
from pretrain.checkpoint.allowed_changes import architecture, check_changes, flatten
from pretrain.checkpoint.manifest import Manifest, check_identity, read_manifest
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.run.folder import complete_checkpoints, folder_of

BIT_EQUAL = "bit for bit as if it had never stopped (on CPUs)"
ONE_ULP = "the restored state is bit-equal, the next loss within one fp32 unit in the last place"
REHEARSED = "the restored state is bit-equal, the next losses as equal as a rehearsal's (1e-5)"


@dataclass(frozen=True)
class ResumePoint:
    """Where a launch would go on: the newest checkpoint's step, who wrote it, how exactly this layout continues."""

    step: int
    checkpoint: str
    written_by: str
    exactness: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_resume_point(
    config: Config, layout: Layout, vocab_size: int | None
) -> tuple[ResumePoint | None, list[Problem], list[Notice]]:
    """Reads manifests only. (None, [], []): the run starts at step 0."""
    folder = folder_of(config)
    notices = []
    for step, path in complete_checkpoints(folder.checkpoints):
        try:
            manifest = read_manifest(path)
        except DamagedFile as damage:
            notices.append(Notice("run.dir", f"{path.name} is damaged and would be passed over: {damage}"))
            continue
        problems = _problems(config, manifest, path, vocab_size)
        return ResumePoint(step, str(path), _writer(manifest), how_exactly(config, layout, manifest)), problems, notices
    return None, [], notices


def _problems(config: Config, manifest: Manifest, path: Any, vocab_size: int | None) -> list[Problem]:
    before = folder_of(config).config
    problems = check_changes(flatten(from_yaml_text(before.read_text())), config) if before.exists() else []
    known = {problem.path for problem in problems}
    vocab = manifest.vocab_size if vocab_size is None else vocab_size
    identity = check_identity(manifest, path, architecture(config.model, vocab), None)
    return problems + [problem for problem in identity if problem.path not in known]


def _writer(manifest: Manifest) -> str:
    sizes = {"tensor": "tp", "context": "cp", "pipeline": "pp", "virtual_pipeline": "vpp", "expert": "ep", "data": "dp"}
    axes = "·".join(f"{short}{manifest.layout[axis]}" for axis, short in sizes.items() if manifest.layout.get(axis, 1) > 1)
    return f"{axes or 'one rank'}, {manifest.engine} ZeRO-{manifest.zero_stage}"


def how_exactly(config: Config, layout: Layout, manifest: Manifest) -> str:
    """The promise for this change of layout; each is held by tests/pretrain/test_train.py or test_reshape.py."""
    now, before = layout.degrees(), manifest.layout
    shape = ("tensor", "sequence", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "data")
    same_engine = (config.zero.engine, config.zero.stage) == (manifest.engine, manifest.zero_stage)
    if same_engine and all(now[axis] == before.get(axis) for axis in shape):
        return BIT_EQUAL
    return ONE_ULP if all(now[axis] == before.get(axis) for axis in ("tensor", "context", "expert_tensor")) else REHEARSED
