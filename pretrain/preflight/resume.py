"""The check of a launch into a run folder with checkpoints. In: a config, its layout and vocabulary size.

Out: the problems with which the ranks would refuse the resume, or the step at which the run continues and how exactly.

Torch-free.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Notice, Problem
from configs.load import from_yaml_text
from configs.schema import Config
from parallel.compat.supported import changed_versions, has_own_libraries
from parallel.layout import Layout
from pretrain.checkpoint.allowed_changes import (
    WORD,
    architecture,
    check_changes,
    flatten,
    has_same_optimizer,
    rule_of,
)
from pretrain.checkpoint.going_back import check_target, newer_checkpoints
from pretrain.checkpoint.manifest import Manifest, check_identity, read_manifest, unfit_problem
from pretrain.checkpoint.named import Identity, all_damaged, warm_start_folder
from pretrain.checkpoint.tensor_file import DamagedFile, UnfitFile
from pretrain.data.tokenizer import TextTokenizer
from pretrain.run.decision import pending_step
from pretrain.run.files import read_json
from pretrain.run.folder import RunFolder, complete_checkpoints, folder_of

BIT_EQUAL = "bit for bit as if it had never stopped (on CPUs)"
ONE_ULP = "the restored state is bit-equal, the next loss within one fp32 unit in the last place"
REHEARSED = "the restored state is bit-equal, the next losses as equal as a rehearsal's (1e-5)"
FRESH_OPTIMIZER = (
    "the restored weights are bit-equal, the optimizer starts afresh, and the run learns something else, for these changed"
)
OTHER_RUN = "the restored state is bit-equal, but from there on the run learns something else, for these changed"


@dataclass(frozen=True)
class ResumePoint:
    """Where a launch would go on: the checkpoint's step, who wrote it, and how exactly this config continues.

    `set_aside`: steps of the later checkpoints that a launch sets aside, because `checkpoint.resume_step` goes back.
    """

    step: int
    checkpoint: str
    written_by: str
    exactness: str
    set_aside: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"set_aside": list(self.set_aside)}

    def describe(self) -> str:
        """The resume point as one line of text."""
        text = f"from step {self.step:,}, written by {self.written_by}: {self.exactness}"
        if not self.set_aside:
            return text
        steps = ", ".join(f"{step:,}" for step in self.set_aside)
        return f"{text}. The run goes back: its checkpoints of steps {steps} are set aside as .rolled_back"


def find_resume_point(
    config: Config, layout: Layout, vocab_size: int | None
) -> tuple[ResumePoint | None, list[Problem], list[Notice]]:
    """Reads manifests and events only. (None, [], []): the run starts at step 0."""
    folder = folder_of(config)
    asked_step = config.checkpoint.resume_step
    back_to_step = pending_step(folder, asked_step)
    if back_to_step is not None and (problems := check_target(folder, back_to_step)):
        return None, problems, []
    notices = _decided_before(folder, asked_step) if back_to_step is None and asked_step is not None else []
    for step, path in complete_checkpoints(folder.checkpoints):
        if back_to_step not in (None, step):
            continue
        try:
            manifest = read_manifest(path)
        except UnfitFile as unfit:
            return None, [unfit_problem(path, unfit)], notices
        except DamagedFile as damage:
            notices.append(Notice("run.dir", f"{path.name} is damaged and would be passed over: {damage}"))
            continue
        problems = _problems(config, manifest, path, vocab_size)
        aside = newer_checkpoints(folder, step) if back_to_step is not None else []
        changed = [] if has_own_libraries(config) else changed_versions(_versions_before(folder))
        exactness = how_exactly(config, layout, manifest, other_libraries=bool(changed))
        notices += [*changed, *_other_samples(config, manifest)]
        return ResumePoint(step, str(path), _writer(manifest), exactness, tuple(aside)), problems, notices
    damaged = [all_damaged(folder.checkpoints)] if complete_checkpoints(folder.checkpoints) and back_to_step is None else []
    return None, damaged, notices


def check_warm_start(config: Config, vocab_size: int, tokenizer: TextTokenizer) -> list[Problem]:
    """Problems of the checkpoint that checkpoint.load names, for a run that starts at step 0. Reads its manifest only."""
    identity = Identity(architecture(config.model, vocab_size), tokenizer.identity(), tuple(config.checkpoint.allow_change))
    try:
        warm_start_folder(config.checkpoint, identity)
    except ConfigError as error:
        return error.problems
    return []


def _versions_before(folder: RunFolder) -> dict[str, str | None]:
    """Library -> version that the last attempt ran with; empty where provenance.json does not tell."""
    provenance = read_json(folder.provenance)
    packages = provenance.get("packages") if isinstance(provenance, dict) else None
    return packages if isinstance(packages, dict) else {}


def _decided_before(folder: RunFolder, asked_step: int) -> list[Notice]:
    text = (
        f"the run went back to step {asked_step} before, and goes on from its newest checkpoint since then, step "
        f"{folder.newest_checkpoint_step()}; to go back once more, start one attempt without checkpoint.resume_step first"
    )
    return [Notice("checkpoint.resume_step", text)]


def _other_samples(config: Config, manifest: Manifest) -> list[Notice]:
    """A notice when another sequence length changes the order of the data."""
    before, now = (manifest.data or {}).get("seq_length_tokens"), config.batch.seq_length_tokens
    if before in (None, now):
        return []
    text = (
        f"was {before} in the checkpoint: the documents are cut into other samples and dealt in another order from step "
        f"{manifest.step + 1} on, so in this pass over the data some text comes again and some does not come"
    )
    return [Notice("batch.seq_length_tokens", text)]


def _problems(config: Config, manifest: Manifest, path: Any, vocab_size: int | None) -> list[Problem]:
    before = folder_of(config).config
    problems = check_changes(flatten(from_yaml_text(before.read_text())), config) if before.exists() else []
    known = {problem.path for problem in problems}
    vocab = manifest.vocab_size if vocab_size is None else vocab_size
    identity = check_identity(manifest, path, architecture(config.model, vocab), None, config.checkpoint.allow_change)
    return problems + [problem for problem in identity if problem.path not in known]


def _writer(manifest: Manifest) -> str:
    sizes = {"tensor": "tp", "context": "cp", "pipeline": "pp", "virtual_pipeline": "vpp", "expert": "ep", "data": "dp"}
    axes = "·".join(f"{short}{manifest.layout[axis]}" for axis, short in sizes.items() if manifest.layout.get(axis, 1) > 1)
    return f"{axes or 'one rank'}, {manifest.engine} ZeRO-{manifest.zero_stage}"


def how_exactly(config: Config, layout: Layout, manifest: Manifest, other_libraries: bool = False) -> str:
    """How exactly the run continues after this change. tests/pretrain/test_train.py and test_reshape.py test the layouts."""
    if changed := _learned_changes(config, layout, manifest):
        keeps_state = has_same_optimizer(manifest.config, config.optimizer)
        return f"{OTHER_RUN if keeps_state else FRESH_OPTIMIZER}: {', '.join(changed)}"
    if other_libraries:
        return REHEARSED
    now, before = layout.degrees(), manifest.layout
    shape = ("tensor", "sequence", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "data")
    same_engine = (config.zero.engine, config.zero.stage) == (manifest.engine, manifest.zero_stage)
    same_cut = _micro_batch_seqs(manifest) in (None, config.batch.micro_batch_seqs)
    if same_engine and same_cut and all(now[axis] == before.get(axis) for axis in shape):
        return BIT_EQUAL
    same_sums = same_cut and all(now[axis] == before.get(axis) for axis in ("tensor", "context", "expert_tensor"))
    return ONE_ULP if same_sums else REHEARSED


def _micro_batch_seqs(manifest: Manifest) -> int | None:
    return manifest.config.get("batch", {}).get("micro_batch_seqs")


def _learned_changes(config: Config, layout: Layout, manifest: Manifest) -> list[str]:
    """Keys that differ from the config that wrote the checkpoint, and that change what is learned."""
    if not manifest.config:
        return []
    try:
        before = flatten(from_yaml_text(json.dumps(manifest.config)))
    except ConfigError:
        # A version with other keys wrote the checkpoint. Its changes were checked when it wrote its config.
        return []
    now = flatten(config)
    changed = [key for key in sorted(before.keys() & now.keys()) if rule_of(key) == WORD and before[key] != now[key]]
    if config.schedule.horizon_steps is None and "schedule.horizon_steps" in changed:
        changed.remove("schedule.horizon_steps")
    if manifest.data is not None and _blend(config) != [(part["name"], part["weight"]) for part in manifest.data["train"]]:
        changed.append("data.train")
    balance, micro_batch_seqs = config.model.moe.router.balance, _micro_batch_seqs(manifest)
    if config.model.moe.num_experts and micro_batch_seqs is not None:
        counted, counted_before = config.batch.micro_batch_seqs, micro_batch_seqs
        if balance == "global_aux_loss":
            counted, counted_before = counted * layout.data, counted_before * manifest.layout.get("data", 1)
        if balance in ("aux_loss", "global_aux_loss") and counted != counted_before:
            changed.append(f"the sequences that {balance} balances at once ({counted_before} -> {counted})")
    return changed


def _blend(config: Config) -> list[tuple[str, float]]:
    """Names and weights of the training data. The ranks compare its content."""
    return [(Path(part.path).name, part.weight) for part in config.data.train]
