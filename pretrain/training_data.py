"""The batches of a training run: read ahead from a position, and read anew after a rollback. Plus the held-out batches."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.process_groups_config import ProcessGroupCollection

from configs.schema import Config
from parallel.batch import global_batch_at
from pretrain.checkpoint.restore import TrainingPosition
from pretrain.data.batches import MicroBatch, Prefetcher, micro_batches
from pretrain.data.samples import SampleStream
from pretrain.data.streams import Streams

# (sequences, input tokens without padding: both of the global batch over all ranks; this rank's micro-batches)
GlobalBatch = tuple[int, int, list[MicroBatch]]


class TrainingData:
    """This rank's micro-batches. Every pipeline stage reads: the first needs tokens, the last labels, all of them documents.

    `validation`: global batches by the key of their loss, the same at every validation; empty without validation data.
    """

    def __init__(
        self,
        config: Config,
        groups: ProcessGroupCollection,
        streams: Streams,
        start: TrainingPosition,
        stop_step: int,
    ) -> None:
        self._config = config
        self._data_rank, self._data_size = groups.dp.rank(), groups.dp.size()
        self._stream = streams.train
        self._stop_step = stop_step
        self._batches = Prefetcher(self._read_from(start))
        self.validation = {key: self._read_validation(stream, batches) for key, (stream, batches) in streams.valid.items()}

    def next(self) -> GlobalBatch:
        """The batch of the next step; waits for the reading thread."""
        return next(self._batches)

    def restart_at(self, position: TrainingPosition) -> None:
        """Go on reading at another position. `close` comes before."""
        self._batches = Prefetcher(self._read_from(position))

    def close(self) -> None:
        """Stop the reading thread."""
        self._batches.close()

    def _read_from(self, start: TrainingPosition) -> Iterator[GlobalBatch]:
        for first, size in batch_positions(self._config, start, self._stop_step):
            yield size, self._stream.tokens_of(range(first, first + size)), self._read(self._stream, first, size)

    def _read_validation(self, stream: SampleStream, batches: int) -> list[list[MicroBatch]]:
        size = self._config.batch.global_batch_seqs
        return [self._read(stream, number * size, size) for number in range(batches)]

    def _read(self, stream: SampleStream, first: int, size: int) -> list[MicroBatch]:
        return micro_batches(stream, first, size, self._config.batch.micro_batch_seqs, self._data_rank, self._data_size)


def batch_positions(config: Config, start: TrainingPosition, stop_step: int) -> Iterator[tuple[int, int]]:
    """(first sample, sequences) of each global batch from `start` to the last step; the batch-size ramp is followed."""
    consumed = start.consumed_samples
    for _ in range(start.step, stop_step):
        size = global_batch_at(config.batch, consumed)
        yield consumed, size
        consumed += size
