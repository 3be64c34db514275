"""Training samples: Megatron's own in the first epoch, each once an epoch, the same for every layout and run length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from configs import schema
from pretrain.data import order_cache
from pretrain.data.blend import PERIOD, Blend
from pretrain.data.indexed import held_out, open_index
from pretrain.data.order import FIELDS, build_order
from pretrain.data.samples import ConcatenatedPart, SampleStream
from pretrain.data.sources import ShownSources, shown_sources
from pretrain.data.streams import Streams, build_streams, data_identity
from pretrain.data.tokenizer import TextTokenizer
from pretrain.preflight.data import check_data, repetition_notices, source_plan
from tests.pretrain.data.conftest import write_pair


def build(config: schema.Config, tokenizer: TextTokenizer, is_builder: bool = True) -> Streams:
    return build_streams(config, tokenizer, is_builder=is_builder, barrier=lambda: None)


def rows(stream: SampleStream, numbers: range) -> list[list[int]]:
    return [stream[number].tokens.tolist() for number in numbers]


class MegatronTokenizer:
    """What GPTDataset asks of a tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.vocab_size, self.eod, self.unique_identifiers = tokenizer.vocab_size, tokenizer.eod_id, tokenizer.identity()


def megatron_dataset(config: schema.Config, tokenizer: TextTokenizer, sequences: range, **changes: Any) -> GPTDataset:
    settings_ = GPTDatasetConfig(
        random_seed=config.run.seed,
        sequence_length=config.batch.seq_length_tokens,
        blend=([config.data.train[0].path], None),
        split="1,0,0",
        path_to_cache="",
        tokenizer=MegatronTokenizer(tokenizer),  # pyright: ignore[reportArgumentType]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.data.mask_eod_loss,
        create_attention_mask=False,
    )
    prefix = config.data.train[0].path
    low = GPTDataset.build_low_level_dataset(prefix, settings_)
    numbers = np.arange(sequences.start, sequences.stop, dtype=np.int32)
    return GPTDataset(low, prefix, numbers, changes.get("num_samples"), Split.train, settings_)


@pytest.mark.parametrize("seed", [0, 1234, 2**32 + 5])
def test_the_first_epoch_is_gptdatasets(config: schema.Config, tokenizer: TextTokenizer, seed: int) -> None:
    config.run.seed = seed % 2**32
    config.data.mask_eod_loss = True
    sequences = held_out(open_index(config.data.train[0].path), 0.1)[0]
    theirs = megatron_dataset(config, tokenizer, sequences)
    config.run.seed = seed
    ours = build(config, tokenizer).train
    assert len(ours) == len(theirs) > 500
    for number in range(0, len(ours), 7):
        item, sample = theirs[number], ours[number]
        assert sample.tokens[:-1].tolist() == item["tokens"].tolist()
        assert sample.tokens[1:].tolist() == item["labels"].tolist()
        assert sample.loss_mask.tolist() == item["loss_mask"].tolist()


def test_later_epochs_hold_each_sample_once_in_another_order(config: schema.Config, tokenizer: TextTokenizer) -> None:
    config.data.train = [schema.BlendPart(config.data.train[0].path)]
    stream = build(config, tokenizer).train
    part, size = stream.parts[0], len(stream)
    assert isinstance(part, ConcatenatedPart)
    shuffles = [tuple(part._order(epoch).shuffle.tolist()) for epoch in range(3)]
    assert len(set(shuffles)) == 3
    for epoch in range(3):
        assert sorted(shuffles[epoch]) == list(range(size))
        tokens = np.concatenate([stream[number].tokens[:-1] for number in range(epoch * size, (epoch + 1) * size)])
        # One epoch reads each token of the part once, but for the last partial sample of its own order.
        counts = np.bincount(tokens, minlength=tokenizer.vocab_size)
        whole = np.bincount(
            np.asarray(part.index.tokens()[: part.index.tokens_before(part.sequences.stop)]), minlength=len(counts)
        )
        assert (whole - counts >= 0).all() and (whole - counts).sum() <= config.batch.seq_length_tokens


def test_order_does_not_depend_on_steps_or_batches_or_where_one_starts(config: schema.Config, tokenizer: TextTokenizer) -> None:
    before = rows(build(config, tokenizer).train, range(40))
    config.run.steps = 100000
    config.batch.global_batch_seqs, config.batch.micro_batch_seqs = 64, 2
    later = build(config, tokenizer, is_builder=False).train
    assert rows(later, range(25, 40)) == before[25:]
    config.run.seed += 1
    assert rows(build(config, tokenizer).train, range(40)) != before


def test_valid_is_disjoint_from_train(config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """Each document has its own token: none is in both."""
    documents = [[10 + number] * 30 for number in range(100)]
    config.data.train = [schema.BlendPart(write_pair(tmp_path / "own", documents))]
    streams = build(config, tokenizer)
    held_out_stream, batches = streams.valid["val_loss"]
    assert batches == config.run.eval_batches
    train, valid = (set(np.unique(rows(stream, range(len(stream))))) for stream in (streams.train, held_out_stream))
    assert not train & valid
    assert valid <= set(range(100, 110)) and len(valid) >= 9
    config.data.valid_fraction = 0.0
    assert not build(config, tokenizer).valid


def test_valid_data_of_its_own_leaves_train_whole(config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    config.data.valid = [schema.BlendPart(write_pair(tmp_path / "valid", [[9] * 400]))]
    streams = build(config, tokenizer)
    valid, _ = streams.valid["val_loss"]
    assert set(np.unique(rows(valid, range(len(valid))))) == {9}
    assert streams.train.parts[0].sequences.stop == open_index(config.data.train[0].path).num_sequences


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=6))
def test_blend_is_megatrons_and_keeps_the_shares(weights: list[float]) -> None:
    period = 4096
    blend = Blend(weights, period)
    shares = np.array(weights) / sum(weights)
    parts, numbers = np.zeros(3 * period, np.int16), np.zeros(3 * period, np.int64)
    helpers.build_blending_indices(parts, numbers, shares, len(shares), 3 * period, False)  # pyright: ignore
    located = [blend.locate(sample) for sample in range(3 * period)]
    assert located[:period] == list(zip(parts[:period].tolist(), numbers[:period].tolist()))
    for part, share in enumerate(shares):
        own = [number for found, number in located if found == part]
        assert own == list(range(len(own)))  # each of the part's samples once, in order
        assert abs(len(own) - share * 3 * period) <= 3 * len(shares)


def test_blend_repeats_its_pattern_far_out() -> None:
    blend = Blend([3, 1])
    far = 5 * PERIOD + 123
    part, number = blend.locate(far)
    assert (part, number) == (blend.locate(123)[0], 5 * int(blend.counts[part]) + blend.locate(123)[1])
    assert blend.counts.sum() == PERIOD and abs(blend.counts[0] - 0.75 * PERIOD) <= 1


def test_blended_stream(config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    paths = [write_pair(tmp_path / name, [[token] * 500] * 20) for name, token in (("a", 5), ("b", 6))]
    config.data.train = [schema.BlendPart(paths[0], 3.0), schema.BlendPart(paths[1], 1.0)]
    stream = build(config, tokenizer).train
    first = [int(stream[number].tokens[0]) for number in range(400)]
    assert (first.count(5), first.count(6)) == (300, 100)


def test_masks(config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    eod = tokenizer.eod_id
    config.batch.seq_length_tokens = 8
    config.data.valid_fraction = 0.0
    config.data.train = [schema.BlendPart(write_pair(tmp_path / "m", [[5, 6, eod, 7, eod, eod, 8, 9, 4]]))]
    plain = build(config, tokenizer).train[0]
    assert plain.tokens.tolist() == [5, 6, eod, 7, eod, eod, 8, 9, 4] and plain.tokens.dtype == np.int64
    assert plain.document_ids is None and plain.loss_mask.tolist() == [1.0] * 8
    config.data.document_mask = config.data.mask_eod_loss = True
    masked = build(config, tokenizer).train[0]
    assert masked.loss_mask.tolist() == [1, 1, 0, 1, 0, 0, 1, 1] and masked.loss_mask.dtype == np.float32
    assert masked.document_ids is not None and masked.document_ids.dtype == np.int32
    assert masked.document_ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]


def test_samples_over_many_short_documents(config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """Documents shorter than a sample, empty ones too: pieces join as Megatron joins them."""
    random = np.random.default_rng(0)
    documents = [random.integers(2, 700, random.integers(0, 9)).tolist() for _ in range(400)]
    config.data.train = [schema.BlendPart(write_pair(tmp_path / "short", documents))]
    config.batch.seq_length_tokens = 16
    config.data.valid_fraction = 0.0
    ours, theirs = build(config, tokenizer).train, megatron_dataset(config, tokenizer, range(400))
    assert len(ours) == len(theirs)
    assert rows(ours, range(len(ours))) == [
        [*item["tokens"].tolist(), int(item["labels"][-1])] for item in (theirs[k] for k in range(len(theirs)))
    ]


def test_shared_index_files(
    config: schema.Config,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Large data: the builder writes, the others read the same; damaged or missing files are made again."""
    config.data.cache_dir = str(tmp_path / "cache")
    wanted = rows(build(config, tokenizer).train, range(30))
    assert not (tmp_path / "cache").exists()  # small data needs no files
    monkeypatch.setattr(order_cache, "CACHED_ENTRIES", 1)
    calls: list[str] = []
    streams = build_streams(config, tokenizer, is_builder=False, barrier=lambda: calls.append("barrier"))
    assert calls == ["barrier"] and rows(streams.train, range(30)) == wanted
    build(config, tokenizer)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2 * len(FIELDS) and all(file.suffix == ".npy" for file in files)
    part = build(config, tokenizer, is_builder=False).train.parts[0]
    assert isinstance(part, ConcatenatedPart) and isinstance(part._order(0).starts, np.memmap)
    for file in files:
        file.write_bytes(file.read_bytes()[:-50])
    assert rows(build(config, tokenizer, is_builder=False).train, range(30)) == wanted
    assert "damaged and is made again" in caplog.text
    build(config, tokenizer)
    caplog.clear()
    assert rows(build(config, tokenizer, is_builder=False).train, range(30)) == wanted
    assert not caplog.text


def test_replaced_data_is_not_read_through_an_old_index(
    config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_cache, "CACHED_ENTRIES", 1)
    config.data.valid_fraction = 0.0
    config.data.train = [schema.BlendPart(write_pair(tmp_path / "d", [[5] * 300, [6] * 300]))]
    build(config, tokenizer)
    write_pair(tmp_path / "d", [[7] * 100, [8] * 500])
    assert set(np.unique(rows(build(config, tokenizer).train, range(9)))) == {7, 8}


def test_epochs_ahead_are_built_for_the_whole_run(
    config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_cache, "CACHED_ENTRIES", 1)
    config.data.cache_dir, config.data.valid_fraction = str(tmp_path / "cache"), 0.0
    config.batch.global_batch_seqs = len(build(config, tokenizer, is_builder=False).train)
    config.run.steps = 2
    build(config, tokenizer)
    assert len(list((tmp_path / "cache").iterdir())) == 3 * len(FIELDS)  # a little more than two epochs


def test_identity_follows_content_and_weights(config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    before = data_identity(config)
    assert before["train"][0]["name"] == "embedded" and len(before["train"][0]["idx_sha256"]) == 64
    assert before == data_identity(config)
    config.data.train[0].weight = 2.0
    assert data_identity(config) != before


def test_one_order_is_a_function_of_its_arguments() -> None:
    lengths = np.arange(1, 300, dtype=np.int32)
    one, two = (build_order(lengths, range(10, 250), 32, 7) for _ in range(2))
    assert all((getattr(one, name) == getattr(two, name)).all() for name in FIELDS)
    assert sorted(one.sequences.tolist()) == list(range(10, 250))


def phased(config: schema.Config, tmp_path: Path) -> schema.Config:
    """Three sources of one token each. At sample 100 the second goes and the third comes; at 150 the third is alone."""
    config.data.valid_fraction = 0.0
    paths = [write_pair(tmp_path / f"of_{token}", [[token] * 200 for _ in range(40 * 64 // 200 + 1)]) for token in (7, 8, 9)]
    config.data.train = [schema.BlendPart(paths[0], 3.0), schema.BlendPart(paths[1], 1.0)]
    config.data.phases = [
        schema.DataPhase(100 * 64 - 5, [schema.BlendPart(paths[0], 1.0), schema.BlendPart(paths[2], 4.0)]),
        schema.DataPhase(150 * 64, [schema.BlendPart(paths[2], 1.0)]),
    ]
    return config


def test_phases_change_the_blend_at_their_tokens_and_sources_go_on(
    config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    stream = build(phased(config, tmp_path), tokenizer).train
    tokens = [int(stream[number].tokens[0]) for number in range(200)]
    assert [tokens[:100].count(token) for token in (7, 8, 9)] == [75, 25, 0]
    assert [tokens[100:150].count(token) for token in (7, 8, 9)] == [10, 0, 40]
    assert set(tokens[150:]) == {9}
    numbers: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for sample in range(200):
        part, number = stream.locate(sample)
        numbers[part].append(number)
        assert stream.find(part, number) == sample
        assert stream.counts_before(sample + 1) == [len(found) for found in numbers.values()]
    assert all(found == list(range(len(found))) for found in numbers.values()), "no sample is read twice or passed over"


def test_the_plan_counts_tokens_and_epochs_of_sources(config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """`check` says what the stream then gives, and warns where a source is repeated too often."""
    stream = build(phased(config, tmp_path), tokenizer).train
    config.run.steps, config.batch.global_batch_seqs, config.data.max_epochs = 25, 8, 1.5
    plan = source_plan(config)
    counts = stream.counts_before(200)
    for row, count, part in zip(plan, counts, stream.parts, strict=True):
        assert abs(row["tokens"] / 64 - count) <= 2
        assert row["epochs"] == pytest.approx(row["tokens"] / 64 / part.samples_per_epoch)
    notices = repetition_notices(config, plan)
    assert [Path(notice.text.split()[0]).name for notice in notices] == ["of_7", "of_9"]


@pytest.mark.parametrize(
    ("change", "path", "rule"),
    [
        (lambda data: data.phases.reverse(), "data.phases[1].from_tokens", "one after another"),
        (lambda data: data.phases[0].train.clear(), "data.phases[0].train", "needs something to train on"),
        (lambda data: setattr(data.phases[1].train[0], "path", "none"), "data.phases[1].train[0].path", "must both exist"),
        (lambda data: data.valid_sets.append(schema.ValidSet("a/b", data.train)), "data.valid_sets[0].name", "letters"),
        (lambda data: data.valid_sets.append(schema.ValidSet("a")), "data.valid_sets[0].parts", "needs data"),
        (
            lambda data: data.valid_sets.extend([schema.ValidSet("a", data.train), schema.ValidSet("a", data.train)]),
            "data.valid_sets[1].name",
            "no other set",
        ),
    ],
)
def test_bad_phases_and_sets(config: schema.Config, tmp_path: Path, change: Any, path: str, rule: str) -> None:
    phased(config, tmp_path)
    assert not check_data(config)
    change(config.data)
    problem = check_data(config)[0]
    assert problem.path == path and rule in problem.rule


def test_shown_sources_are_bounded_and_have_names_of_their_own() -> None:
    config = schema.Config()
    paths = ("a/web", "b/web", "c/code", "d/a b", "e/other")
    config.data.train = [schema.BlendPart(path, weight) for path, weight in zip(paths, (5, 1, 3, 0.5, 2), strict=True)]
    assert shown_sources(config).names == ("web", "web_2", "code", "a_b", "other")
    config.metrics.source_losses = 3
    assert shown_sources(config) == ShownSources(("web", "code", "other", "other_sources"), (0, 3, 1, 3, 2))
    config.metrics.source_losses = 0
    assert shown_sources(config) == ShownSources()
