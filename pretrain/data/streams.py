"""The data of a run. In: config and tokenizer. Out: `Streams` of samples, and the identity of the data.

The modules behind it: samples.py gives the tokens of a sample number, order.py shuffles, blend.py weighs the parts, and
batches.py prepares a rank's micro-batches ahead. `check_data` of pretrain/preflight/data.py runs first and reports bad files.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import BlendPart, Config
from pretrain.data.indexed import held_out, index_sha256, open_index, samples_in
from pretrain.data.order_cache import cache_folder
from pretrain.data.samples import PartStream, SampleMasks, SampleStream
from pretrain.data.tokenizer import TextTokenizer

TRAIN, VALID, WHOLE = 0, 1, None


@dataclass(frozen=True)
class Streams:
    """The samples of a run. `valid` is None where nothing is held out and data.valid is empty."""

    train: SampleStream
    valid: SampleStream | None


def build_streams(config: Config, tokenizer: TextTokenizer, *, is_builder: bool, barrier: Callable[[], None]) -> Streams:
    """Open all data. Expects data that `check_data` accepts. Raises ConfigError or OSError.

    The builder first writes the order files of large data. It is one rank, or one rank a machine where the cache folder is
    local. Every rank then calls `barrier` once.
    """
    data = config.data
    masks = SampleMasks(tokenizer.eod_id, data.document_mask, data.mask_eod_loss)
    train = open_stream(config, data.train, TRAIN, masks)
    assert train, "no part of data.train has a sample; check_data reports this"
    valid = open_stream(config, data.valid, WHOLE, masks) if data.valid else open_stream(config, data.train, VALID, masks)
    if is_builder:
        train.build_cache(_planned_samples(config))
        if valid:
            valid.build_cache(config.run.eval_batches * config.batch.global_batch_seqs)
    barrier()
    return Streams(train, valid)


def open_stream(config: Config, parts: list[BlendPart], split: int | None, masks: SampleMasks) -> SampleStream | None:
    """A blend of the parts that have a sample; None where none has. Raises ConfigError for unusable files.

    `split`: TRAIN or VALID of each part, where data.valid_fraction is held out, or WHOLE.
    """
    data, seq = config.data, config.batch.seq_length_tokens
    fraction = 0.0 if data.valid else data.valid_fraction
    made, weights = [], []
    for part in parts:
        index = open_index(part.path)
        sequences = range(index.num_sequences) if split is None else held_out(index, fraction)[split]
        if samples_in(index, sequences, seq):
            made.append(PartStream(index, sequences, seq, config.run.seed, cache_folder(data, part.path)))
            weights.append(part.weight)
    return SampleStream(made, weights, masks) if made else None


def _planned_samples(config: Config) -> int:
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
    }
