"""Best-fit packing against a plain O(n²) reader of the paper's rule, and what holds for every document of an epoch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from configs import schema
from pretrain.data import order_cache
from pretrain.data.batches import micro_batches
from pretrain.data.indexed import open_index
from pretrain.data.packing import documents as documents_module
from pretrain.data.packing.best_fit import pack
from pretrain.data.packing.part import PackedPart
from pretrain.data.packing.permutation import make_key, permuted, unpermuted
from pretrain.data.samples import SampleStream
from pretrain.data.streams import build_streams
from pretrain.data.tokenizer import TextTokenizer
from tests.pretrain.data.conftest import write_pair

Documents = list[list[int]]


def rooms_of_plain_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """The rule of arXiv 2404.10830, section 3.2, read word by word: the room left in each sequence."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda number: rooms[number])] -= size
        else:
            rooms.append(capacity - size)
    return rooms


def test_sequences_are_those_of_the_papers_rule() -> None:
    random = np.random.default_rng(0)
    for _ in range(150):
        capacity, number = int(random.integers(1, 60)), int(random.integers(0, 150))
        sizes = np.minimum(random.geometric(random.uniform(0.03, 0.5), number), capacity)
        packing = pack(np.bincount(sizes, minlength=capacity + 1), capacity)
        rooms = np.repeat(capacity - packing.fills, np.diff(packing.ends, prepend=0))
        assert sorted(rooms.tolist()) == sorted(rooms_of_plain_best_fit(sizes.tolist(), capacity))
        held = {}
        for sequence in range(packing.num_sequences):
            slots = list(zip(*(array.tolist() for array in packing.slots(sequence)), strict=True))
            assert sum(size for size, _ in slots) == capacity - rooms[sequence]
            held |= dict.fromkeys(slots, sequence)
        # Each piece has a slot of its own, and is found from it.
        assert Counter(size for size, _ in held) == Counter(sizes.tolist())
        assert all(packing.sequence_of(*slot) == sequence for slot, sequence in held.items())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 4097])
def test_a_permutation_has_an_inverse(size: int) -> None:
    numbers, key = np.arange(size), make_key(5, size)
    places = permuted(numbers, size, key)
    assert sorted(places.tolist()) == numbers.tolist()
    assert unpermuted(places, size, key).tolist() == numbers.tolist()


def test_permutations_are_even() -> None:
    """Over many keys each item comes to each place, and pairs of neighbours to each distance, as often: chi-squared."""
    size, keys = 12, 24_000
    every = np.tile(np.arange(size), keys)
    places = permuted(every, size, np.repeat(make_key(np.arange(keys)), size)).reshape(keys, size)
    for first in range(size):
        counts = np.bincount(places[:, first], minlength=size)
        assert ((counts - keys / size) ** 2).sum() / (keys / size) < 40  # 11 degrees of freedom: p = 4e-5
    distances = np.bincount((places[:, 1] - places[:, 0]) % size, minlength=size)[1:]
    assert ((distances - keys / 11) ** 2).sum() / (keys / 11) < 38


def some_documents(number: int, longest: int, eod: int, seed: int = 0) -> Documents:
    """Documents whose tokens say their place: no two have the same tokens. Some are empty, some have one token."""
    random = np.random.default_rng(seed)
    made: Documents = []
    for _ in range(number):
        length = int(random.integers(0, longest) if random.random() < 0.2 else random.integers(0, 30))
        made.append([*random.integers(300, 60000, max(length - 1, 0)).tolist(), eod][:length])
    return made


@pytest.fixture
def packed(config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path) -> tuple[schema.Config, Documents]:
    """A config of one packed part, sequences of 64 tokens, and its documents."""
    made = some_documents(300, 300, tokenizer.eod_id)
    config.data.packing, config.data.valid_fraction = "best_fit", 0.0
    config.data.train = [schema.BlendPart(write_pair(tmp_path / "own", made))]
    return config, made


def open_packed(config: schema.Config, tokenizer: TextTokenizer) -> SampleStream:
    return build_streams(config, tokenizer, is_builder=True, barrier=lambda: None).train


def test_every_token_once_an_epoch_and_no_document_cut_that_fits(
    packed: tuple[schema.Config, Documents], tokenizer: TextTokenizer
) -> None:
    config, documents = packed
    stream, seq = open_packed(config, tokenizer), config.batch.seq_length_tokens
    part, companions = stream.parts[0], []
    for epoch in range(3):
        found: dict[int, list[tuple[int, list[int]]]] = {}
        holders: dict[int, set[int]] = {}
        numbers = range(epoch * len(stream), (epoch + 1) * len(stream))
        for number in numbers:
            spans, rows = part.spans(number), part.pieces(number)
            assert sum(len(row) for row in rows) <= seq + 1
            companions.append((epoch, frozenset(span.sequence for span in spans)))
            for span, row in zip(spans, rows, strict=True):
                found.setdefault(span.sequence, []).append((span.offset, row.tolist()))
                holders.setdefault(span.sequence, set()).add(number)
        for number, document in enumerate(documents):
            pieces = sorted(found.pop(number, []))
            assert len(pieces) <= 1 or len(document) > seq + 1
            # The last token of a piece is the first of the next: a label there, an input here.
            whole = [token for offset, row in pieces for token in row[bool(offset) :]]
            assert whole == document
            assert all(len(row) == seq + 1 for _, row in pieces[:-1])
            assert sorted(part.numbers_of(number, epoch)) == sorted(holders.get(number, ()))
        assert not found
    together = [{one for which, one in companions if which == epoch and len(one) > 1} for epoch in (0, 1)]
    assert len(together[0] & together[1]) < len(together[0]) / 10, "documents have other neighbours in the next epoch"


def test_masks_end_at_documents_and_padding_counts_nowhere(
    packed: tuple[schema.Config, Documents], tokenizer: TextTokenizer
) -> None:
    config, documents = packed
    config.data.document_mask = config.data.mask_eod_loss = True
    stream, eod, seq = open_packed(config, tokenizer), tokenizer.eod_id, config.batch.seq_length_tokens
    part, counted = stream.parts[0], 0
    for number in range(len(stream)):
        sample, rows = stream[number], part.pieces(number)
        ids, weights = [], []
        for document, row in enumerate(rows):
            ids += [document] * len(row)
            weights += [1.0] * (len(row) - 1) + [0.0]
        filled = len(ids)
        assert sample.tokens.tolist() == [*np.concatenate(rows).tolist(), *[eod] * (seq + 1 - filled)]
        assert sample.document_ids is not None
        assert sample.document_ids.tolist() == [*ids, *[len(rows)] * (seq + 1 - filled)][:seq]
        assert sample.loss_mask.tolist() == [*weights, *[0.0] * (seq + 1 - filled)][:seq]
        assert stream.tokens_of(range(number, number + 1)) == min(filled, seq)
        counted += min(filled, seq)
    assert counted == part.tokens_per_epoch == stream.tokens_of(range(len(stream)))
    assert int(sum(stream[n].loss_mask.sum() for n in range(len(stream)))) == sum(max(len(one) - 1, 0) for one in documents)
    config.data.mask_eod_loss = config.data.document_mask = False
    plain = open_packed(config, tokenizer)
    for number in range(len(plain)):
        filled = sum(len(row) for row in part.pieces(number))
        assert plain[number].loss_mask.tolist() == [1.0] * min(filled - 1, seq) + [0.0] * (seq - min(filled - 1, seq))
        assert plain[number].document_ids is None


@pytest.mark.parametrize("growth", [0, 3])
def test_tokens_of_any_range_are_exact(packed: tuple[schema.Config, Documents], growth: int) -> None:
    config, _ = packed
    index, seq = open_index(config.data.train[0].path), config.batch.seq_length_tokens
    part = PackedPart(index, range(index.num_sequences), seq, 7, Path("unused"), growth)
    size = part.samples_per_epoch
    single = [min(sum(span.length for span in part.spans(number)), seq) for number in range(3 * size)]
    assert sum(single) == 3 * part.tokens_per_epoch
    for first, stop in [(0, 5), (3, 3), (7, size - 1), (size - 4, size + 9), (2, 3 * size), (size, 2 * size), (5, 2 * size + 5)]:
        assert part.tokens_between(first, stop) == sum(single[first:stop])


def test_fill_in_the_middle_cuts_no_document(
    packed: tuple[schema.Config, Documents], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    config, documents = packed
    fim = config.data.fim
    fim.prefix, fim.middle, fim.suffix = (tokenizer.token(number) for number in (200, 201, 202))
    fim.rate = 0.6
    stream, found = open_packed(config, tokenizer), Counter[tuple[int, ...]]()
    part, eod, seq = stream.parts[0], tokenizer.eod_id, config.batch.seq_length_tokens
    changed = 0
    for number in range(len(stream)):
        sample, rows = stream[number], part.pieces(number)
        marks = np.isin(sample.tokens, (200, 201, 202))
        changed += int(marks.sum()) // 3
        kept = sample.tokens[~marks]
        text = np.concatenate(rows)
        # The same tokens in another order, and padding behind them: what has grown is not cut.
        assert sorted(kept[: len(text)].tolist()) == sorted(text.tolist()) and set(kept[len(text) :].tolist()) <= {eod}
        grown = len(text) + int(marks.sum())
        assert grown <= seq + 1 and not sample.loss_mask[grown - 1 :].any()
        found.update(tuple(row.tolist()) for row in rows)
        assert np.array_equal(sample.tokens, stream[number].tokens)
    longer = sum(len(document) > 2 for document in documents)
    assert 0.4 < changed / longer < 1.1


def test_documents_of_several_sequences_stay_whole(config: schema.Config, tmp_path: Path) -> None:
    """A foreign file may keep a document as sentences."""
    path = write_pair(tmp_path / "d", [[5, 6], [7], [8, 9, 10], [11], [12, 13]])
    raw = bytearray(Path(f"{path}.idx").read_bytes())
    head, marks = len(raw) - 8 * 6, np.array([0, 3, 3, 5], np.int64).tobytes()
    raw[26:34] = np.array([4], np.int64).tobytes()
    Path(f"{path}.idx").write_bytes(bytes(raw[:head]) + marks)
    index = open_index(path)
    part = PackedPart(index, range(5), 8, 0, tmp_path, 0)
    rows = sorted(row.tolist() for number in range(part.samples_per_epoch) for row in part.pieces(number))
    assert rows == [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    assert part.numbers_of(0, 0) and part.numbers_of(3, 0) and part.numbers_of(1, 0) == part.numbers_of(4, 0) == []


def test_blends_and_held_out_documents(config: schema.Config, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    made = [write_pair(tmp_path / name, [[token] * 30 for _ in range(200)]) for name, token in (("a", 5), ("b", 6))]
    config.data.packing, config.data.train = "best_fit", [schema.BlendPart(made[0], 3.0), schema.BlendPart(made[1], 1.0)]
    config.data.valid_sets = [schema.ValidSet("own", [schema.BlendPart(made[1])], 2)]
    streams = build_streams(config, tokenizer, is_builder=True, barrier=lambda: None)
    first = [int(streams.train[number].tokens[0]) for number in range(400)]
    assert (first.count(5), first.count(6)) == (300, 100)
    # Two documents of 30 tokens in 65: 90 documents of each part are trained on, 10 are held out; 180 and 20 in fact.
    assert [part.samples_per_epoch for part in streams.train.parts] == [90, 90]
    assert [part.samples_per_epoch for part in streams.valid["val_loss"][0].parts] == [10, 10]
    assert len(streams.valid["val_loss/own"][0]) == 100
    assert streams.train.tokens_of(range(10, 30)) == 20 * 60
    assert [stream.tokens_of(range(2)) for stream, _ in streams.valid.values()] == [120, 120]


def test_ranks_read_the_same_samples_under_any_layout(packed: tuple[schema.Config, Documents], tokenizer: TextTokenizer) -> None:
    config, _ = packed
    stream = open_packed(config, tokenizer)
    whole = [batch.tokens for batch in micro_batches(stream, 5, 8, 2, 0, 1)]
    for ranks in (2, 4):
        again = open_packed(config, tokenizer)
        parts = [[batch.tokens for batch in micro_batches(again, 5, 8, 2, rank, ranks)] for rank in range(ranks)]
        joined = [parts[number % ranks][number // ranks] for number in range(4)]
        assert all((one == other).all() for one, other in zip(whole, joined, strict=True))


BUILD = """
import os, signal, sys
from pathlib import Path
from pretrain.data.indexed import open_index
from pretrain.data.packing import documents
from pretrain.data.packing.part import PackedPart
from pretrain.data import order_cache
order_cache.CACHED_ENTRIES = 1
documents.CHUNK, documents._TELL_EVERY_S = 50, 0.0
index = open_index(sys.argv[1])
part = PackedPart(index, range(index.num_sequences), 64, 7, Path(sys.argv[2]), 0)
part.build_cache(1, lambda text: print(text) or os.kill(os.getpid(), int(sys.argv[3])))
"""


def test_a_killed_build_leaves_nothing_half_and_the_next_one_cleans_up(
    packed: tuple[schema.Config, Documents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = packed[0].data.train[0].path, tmp_path / "cache"
    built = [sys.executable, "-c", BUILD, path, str(cache)]
    killed = subprocess.run([*built, "9"], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert killed.returncode == -9 and "50 of 300 documents are sorted" in killed.stdout
    assert {file.suffix for file in cache.iterdir()} == {".partial"}
    index = open_index(path)
    monkeypatch.setattr(order_cache, "CACHED_ENTRIES", 1)
    part = PackedPart(index, range(index.num_sequences), 64, 7, cache, 0)
    monkeypatch.setattr(documents_module, "CHUNK", 37)
    part.build_cache(1, lambda text: None)
    assert sorted(file.suffix for file in cache.iterdir()) == [".npy"] * 3
    assert isinstance(part._documents().rests, np.memmap)
    monkeypatch.setattr(order_cache, "CACHED_ENTRIES", 1 << 22)
    own = PackedPart(index, range(index.num_sequences), 64, 7, cache, 0)
    assert not own.cached
    assert [part.spans(number) for number in range(40)] == [own.spans(number) for number in range(40)]
