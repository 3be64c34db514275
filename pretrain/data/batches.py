"""The tensors of one rank's step. In: a stream of samples and the step's first sample. Out: `MicroBatch`es, prepared ahead.

Shapes: b = batch.micro_batch_seqs, s = batch.seq_length_tokens.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import torch

from pretrain.data.samples import SampleStream

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """tokens, labels, position_ids: int64 [b, s]. loss_mask: float32 [b, s]. document_ids: int32 [b, s]. parts: int64 [b].

    document_ids is None where attention may cross the borders of documents. `parts` are the parts of the blend; None: unknown.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor | None
    parts: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> MicroBatch:
        """A copy on a device. From pinned memory the copy overlaps with computing."""
        tensors = (getattr(self, item.name) for item in fields(self))
        return MicroBatch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors))  # pyright: ignore


def micro_batches(
    stream: SampleStream, first_sample: int, global_batch_seqs: int, micro_batch_seqs: int, data_rank: int, data_size: int
) -> list[MicroBatch]:
    """This data rank's micro-batches of the global batch that begins at `first_sample`.

    The global batch is cut into consecutive micro-batches, and rank r of d ranks takes numbers r, r + d, r + 2d, … The number
    of ranks therefore changes which rank has a micro-batch, and never its content.
    """
    number, rest = divmod(global_batch_seqs, micro_batch_seqs * data_size)
    assert not rest, f"a global batch of {global_batch_seqs} is no multiple of {micro_batch_seqs} × {data_size} ranks"
    firsts = (first_sample + (k * data_size + data_rank) * micro_batch_seqs for k in range(number))
    return [_micro_batch(stream, range(first, first + micro_batch_seqs)) for first in firsts]


def _micro_batch(stream: SampleStream, numbers: range) -> MicroBatch:
    samples = [stream[number] for number in numbers]
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    loss_mask = torch.from_numpy(np.stack([sample.loss_mask for sample in samples]))
    masks = [sample.document_ids for sample in samples if sample.document_ids is not None]
    documents = torch.from_numpy(np.stack(masks)) if masks else None
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs).contiguous()
    parts = torch.tensor([stream.locate(number)[0] for number in numbers])
    return MicroBatch(inputs, labels, loss_mask, positions, documents, parts)


class Prefetcher(Generic[T]):
    """Runs an iterator in a thread, `depth` items ahead. An error of the iterator is raised in place of the item.

    `close`, or the end of the context manager, stops the thread after the item that it is working on.
    """

    def __init__(self, source: Iterator[T], depth: int = 1) -> None:
        self._queue: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(source,), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, source: Iterator[T]) -> None:
        try:
            for item in source:
                self._put("item", item)
                if self._stop.is_set():
                    return
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)

    def _put(self, kind: str, item: T | BaseException | None) -> None:
        """Put an item into the queue. Waits for room, and gives up after `close`."""
        while not self._stop.is_set():
            try:
                self._queue.put((kind, item), timeout=0.1)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        kind, item = self._queue.get()
        if kind == "item":
            return item  # pyright: ignore[reportReturnType]
        self._ended = True
        self._thread.join()
        if kind == "error":
            assert isinstance(item, BaseException), "an error is kept as it was raised"
            raise item
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it. Items that were not taken are dropped."""
        self._stop.set()
        self._ended = True
        self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
