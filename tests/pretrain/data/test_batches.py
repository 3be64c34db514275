"""A rank's tensors: the set of micro-batches is the layout's business only in who owns them; the prefetcher adds nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from configs import schema
from pretrain.data.batches import MicroBatch, Prefetcher, micro_batches
from pretrain.data.samples import SampleStream
from pretrain.data.streams import build_streams
from pretrain.data.tokenizer import TextTokenizer


@pytest.fixture
def stream(config: schema.Config, tokenizer: TextTokenizer) -> SampleStream:
    config.data.document_mask = True
    return build_streams(config, tokenizer, is_builder=True, barrier=lambda: None).train


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_micro_batches_are_the_same_for_every_data_size(stream: SampleStream, data_size: int) -> None:
    found: dict[int, MicroBatch] = {}
    for rank in range(data_size):
        for place, batch in enumerate(micro_batches(stream, 100, 16, 2, rank, data_size)):
            found[place * data_size + rank] = batch
    assert sorted(found) == list(range(8))
    for number, batch in found.items():
        for row in range(2):
            sample = stream[100 + 2 * number + row]
            assert batch.tokens[row].tolist() == sample.tokens[:-1].tolist()
            assert batch.labels[row].tolist() == sample.tokens[1:].tolist()


@pytest.mark.parametrize(("micro", "data_size"), [(1, 1), (2, 4), (8, 2), (16, 1)])
def test_a_step_is_the_same_samples_for_every_split(stream: SampleStream, micro: int, data_size: int) -> None:
    taken = [batch.tokens for rank in range(data_size) for batch in micro_batches(stream, 32, 16, micro, rank, data_size)]
    wanted = {tuple(stream[32 + k].tokens[:-1].tolist()) for k in range(16)}
    assert {tuple(row.tolist()) for tokens in taken for row in tokens} == wanted


def test_stopping_and_going_on_is_going_through(stream: SampleStream) -> None:
    through = [micro_batches(stream, 8 * step, 8, 2, 1, 2) for step in range(6)]
    resumed = [micro_batches(stream, 8 * step, 8, 2, 1, 2) for step in range(3, 6)]
    for one, two in zip(through[3:], resumed):
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, two))


def test_shapes_and_types(stream: SampleStream) -> None:
    batch = micro_batches(stream, 0, 4, 4, 0, 1)[0]
    for name, dtype in (
        ("tokens", torch.int64),
        ("labels", torch.int64),
        ("loss_mask", torch.float32),
        ("position_ids", torch.int64),
        ("document_ids", torch.int32),
    ):
        tensor = getattr(batch, name)
        assert tensor.shape == (4, 64) and tensor.dtype == dtype and tensor.is_contiguous(), name
    assert batch.position_ids[2].tolist() == list(range(64))
    assert torch.equal(batch.to("cpu").tokens, batch.tokens)


def test_a_global_batch_that_cannot_be_divided(stream: SampleStream) -> None:
    with pytest.raises(AssertionError, match="no multiple of 2 × 3 ranks"):
        micro_batches(stream, 0, 16, 2, 0, 3)


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_prefetcher_keeps_the_order_and_ends() -> None:
    with Prefetcher(iter(range(50))) as ahead:
        assert list(ahead) == list(range(50))
        assert list(ahead) == []
    assert prefetch_threads() == 0


def test_prefetcher_raises_the_error_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with Prefetcher(items()) as ahead:
        assert next(ahead) == 1
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
        with pytest.raises(StopIteration):
            next(ahead)


def test_prefetcher_stays_a_bounded_number_ahead_and_stops_at_once() -> None:
    made: list[int] = []

    def endless() -> Iterator[int]:
        number = 0
        while True:
            made.append(number)
            yield number
            number += 1

    with Prefetcher(endless(), depth=2) as ahead:
        assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
        time.sleep(0.2)
        assert len(made) <= 5 + 2 + 1
    assert prefetch_threads() == 0
