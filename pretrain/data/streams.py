"""The data of a run. In: config and tokenizer. Out: `Streams` of samples, and the identity of the data.

The modules behind it: samples.py gives the tokens of a sample number, order.py shuffles, packing/ packs documents by best fit,
blend.py weighs the parts, and batches.py prepares a rank's micro-batches ahead. `check_data` of pretrain/preflight/data.py runs
first and reports bad files.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.data_schema import BlendPart, Data
from configs.errors import ConfigError, Problem
from configs.schema import Config
from pretrain.data.fim import GROWTH_TOKENS, FillInTheMiddle
from pretrain.data.indexed import held_out, index_sha256, open_index
from pretrain.data.order_cache import cache_folder
from pretrain.data.packing.part import PackedPart
from pretrain.data.samples import ConcatenatedPart, Mix, PartStream, SampleMasks, SampleStream
from pretrain.data.tokenizer import TextTokenizer

TRAIN, VALID, WHOLE = 0, 1, None
NO_MASKS = SampleMasks(-1, False, False)
"""For readers that need the places of samples only."""


@dataclass(frozen=True)
class Streams:
    """The samples of a run. `valid`: streams of validation samples with their numbers of batches, by the key of their loss."""

    train: SampleStream
    valid: dict[str, tuple[SampleStream, int]]


def build_streams(
    config: Config,
    tokenizer: TextTokenizer,
    *,
    is_builder: bool,
    barrier: Callable[[], None],
    say: Callable[[str], None] = lambda text: None,
) -> Streams:
    """Open all data. Expects data that `check_data` accepts. Raises ConfigError or OSError.

    The builder first writes the order files of large data, and tells `say` how far it is. It is one rank, or one rank a machine
    where the cache folder is local. Every rank then calls `barrier` once.
    """
    data = config.data
    masks = SampleMasks(tokenizer.eod_id, data.document_mask, data.mask_eod_loss)
    train = open_train(config, replace(masks, fim=make_fim(config, tokenizer)))
    valid: dict[str, tuple[SampleStream, int]] = {}
    held_out_stream = open_blend(config, data.valid, WHOLE, masks) if data.valid else open_blend(config, data.train, VALID, masks)
    if held_out_stream and config.run.eval_batches:
        valid["val_loss"] = held_out_stream, config.run.eval_batches
    for one in data.valid_sets:
        stream, batches = open_blend(config, one.parts, WHOLE, masks), one.batches or config.run.eval_batches
        if stream and batches:
            valid[f"val_loss/{one.name}"] = stream, batches
    if is_builder:
        train.build_cache(planned_samples(config), say)
        for stream, batches in valid.values():
            stream.build_cache(batches * config.batch.global_batch_seqs, say)
    barrier()
    return Streams(train, valid)


def make_fim(config: Config, tokenizer: TextTokenizer) -> FillInTheMiddle | None:
    """Fill-in-the-middle of the training data; None where it is off. Raises ConfigError for tokens that are missing."""
    fim = config.data.fim
    if not fim.rate:
        return None
    names = {"prefix": fim.prefix, "middle": fim.middle, "suffix": fim.suffix}
    ids = {part: tokenizer.find(name) for part, name in names.items()}
    rule = f"the tokenizer {tokenizer.path} must have this token"
    fix = "name the tokenizer's own token, or set data.fim.rate=0"
    problems = [Problem(f"data.fim.{part}", names[part], rule, fix) for part, token in ids.items() if token is None]
    if len(set(names.values())) < len(names):
        problems.append(Problem("data.fim", list(names.values()), "the three tokens must differ", "name three tokens"))
    if problems:
        raise ConfigError(problems)
    prefix, middle, suffix = (token for token in ids.values() if token is not None)
    return FillInTheMiddle(fim.rate, fim.spm_rate, prefix, middle, suffix, tokenizer.eod_id, config.run.seed)


def open_train(config: Config, masks: SampleMasks) -> SampleStream:
    """The training data with its phases. Raises ConfigError for unusable files."""
    opened = {path: _open_part(config, path, TRAIN) for path in source_paths(config.data)}
    parts = [part for part in opened.values() if part]
    if len(parts) < len(opened):
        lacking = next(path for path, part in opened.items() if part is None)
        rule = f"each part needs a sample of batch.seq_length_tokens = {config.batch.seq_length_tokens}"
        raise ConfigError(Problem("data.train", lacking, rule, "give more text, or lower batch.seq_length_tokens"))
    mixes = []
    for first_sample, blend in train_phases(config):
        weights = [sum(part.weight for part in blend if part.path == path) for path in opened]
        mixes.append(Mix(first_sample, tuple(weights)))
    return SampleStream(parts, mixes, masks)


def train_phases(config: Config) -> list[tuple[int, list[BlendPart]]]:
    """(first sample, blend) of data.train and of each phase. A phase begins with the first sample at or past its tokens."""
    seq, data = config.batch.seq_length_tokens, config.data
    return [(0, data.train), *((-(-phase.from_tokens // seq), phase.train) for phase in data.phases)]


def source_paths(data: Data) -> list[str]:
    """The path of each source of the training data once, in the order of the config."""
    return list(dict.fromkeys(part.path for blend in (data.train, *(phase.train for phase in data.phases)) for part in blend))


def open_blend(config: Config, parts: list[BlendPart], split: int | None, masks: SampleMasks) -> SampleStream | None:
    """A blend of the parts that have a sample; None where none has. Raises ConfigError for unusable files."""
    opened = [(_open_part(config, part.path, split), part.weight) for part in parts]
    found = [(part, weight) for part, weight in opened if part]
    mix = Mix(0, tuple(weight for _, weight in found))
    return SampleStream([part for part, _ in found], [mix], masks) if found else None


def _open_part(config: Config, path: str, split: int | None) -> PartStream | None:
    """`split`: TRAIN or VALID, where data.valid_fraction is held out, or WHOLE. None: it has no sample. Raises ConfigError."""
    data, seq = config.data, config.batch.seq_length_tokens
    index = open_index(path)
    fraction = 0.0 if data.valid else data.valid_fraction
    sequences = range(index.num_sequences) if split is None else held_out(index, fraction)[split]
    cache, growth = cache_folder(data, path), fim_growth(data) if split == TRAIN else 0
    if is_packed(data):
        part: PartStream = PackedPart(index, sequences, seq, config.run.seed, cache, growth)
    else:
        part = ConcatenatedPart(index, sequences, seq, config.run.seed, cache)
    return part if part.samples_per_epoch else None


def is_packed(data: Data) -> bool:
    """Whether documents are packed by best fit."""
    return data.packing == "best_fit"


def fim_growth(data: Data) -> int:
    """Tokens by which a training document may grow."""
    return GROWTH_TOKENS if data.fim.rate else 0


def planned_samples(config: Config) -> int:
    """The number of samples that the configured run reads. It only decides which epochs are built ahead."""
    by_steps = (config.run.steps or 0) * config.batch.global_batch_seqs
    by_tokens = -(-(config.run.tokens or 0) // config.batch.seq_length_tokens)
    return max(by_steps, by_tokens, 1)


def data_identity(config: Config) -> dict[str, Any]:
    """Everything that the order of the data depends on, as JSON, for checkpoints and for the check of a resume.

    Raises ConfigError for unusable data.
    """

    def parts(blend: list[BlendPart]) -> list[dict[str, Any]]:
        found = []
        for part in blend:
            index = open_index(part.path)
            counts = {"num_documents": index.num_documents, "num_tokens": index.num_tokens}
            found.append({"name": Path(part.path).name, "weight": part.weight, **counts, "idx_sha256": index_sha256(part.path)})
        return found

    return {
        "seed": config.run.seed,
        "seq_length_tokens": config.batch.seq_length_tokens,
        "valid_fraction": 0.0 if config.data.valid else config.data.valid_fraction,
        "train": parts(config.data.train),
        "valid": parts(config.data.valid),
        "phases": [{"from_tokens": phase.from_tokens, "train": parts(phase.train)} for phase in config.data.phases],
    }
