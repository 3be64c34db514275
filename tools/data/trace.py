"""The documents behind the steps of a run, and the steps that see a document. In: a run's history. Out: dicts for JSON.

A sample number gives a part of the blend and the spans of its file (pretrain/data/samples.py), and the run's history gives the
samples of a step (pretrain/data/history.py). The token files must lie where the config of the run says. Nothing is written.

Torch-free.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem
from configs.schema import Config
from parallel.layout import make_layout
from pretrain.data.history import RunHistory, Stretch
from pretrain.data.indexed import Index
from pretrain.data.order import Span
from pretrain.data.samples import SampleStream
from pretrain.data.tokenizer import TextTokenizer, load_tokenizer
from tools.data.traced_data import TracedData

DISCARDED, PASSED_OVER = "discarded", "passed over"
# More samples than a person reads, and some 100 MB of JSON.
MOST_SAMPLES = 200_000


def trace_steps(history: RunHistory, first: int, last: int, rank: int | None, with_text: bool) -> dict[str, Any]:
    """What the steps `first` to `last` read, or will read. `rank`: only the samples of this rank. Raises ConfigError.

    A step that was trained more than once, with other samples, has an entry for each.
    """
    data = TracedData(history)
    found = _stretches_of(history, first, last)
    count = sum(stretch.batch_seqs for stretch in found)
    if count > MOST_SAMPLES:
        rule = f"at most {MOST_SAMPLES:,} samples at a time, these steps have {count:,}"
        raise ConfigError(Problem("--step", f"{first}:{last}", rule, "name fewer steps"))
    steps = []
    for stretch in found:
        config = history.config_of(stretch.attempt)
        tokenizer = load_tokenizer(config.data.tokenizer) if with_text else None
        samples = _samples_of(stretch, config, data.stream(stretch.attempt), rank, tokenizer)
        steps.append(
            {
                "step": stretch.first_step,
                "attempt": stretch.attempt or None,
                "state": DISCARDED if stretch.discarded else stretch.state,
                "first_sample": stretch.first_sample,
                "seqs": stretch.batch_seqs,
                "samples": samples,
            }
        )
    return {"run_dir": str(history.folder.path), "steps": steps}


def _stretches_of(history: RunHistory, first: int, last: int) -> list[Stretch]:
    """One stretch a step, by step; the one that counts first. Raises ConfigError where a step is none of the run's."""
    found: dict[int, list[Stretch]] = {}
    for stretch in history.stretches(first, last):
        _add(found, stretch, first, last)
    newest = history.newest()
    end = newest.end_step - 1 if newest else 0
    for stretch in history.planned(newest):
        _add(found, stretch, first, last)
        end = stretch.end_step - 1
    for stretch in history.discarded():
        _add(found, stretch, first, last)
    missing = next((step for step in range(first, last + 1) if step not in found), None)
    if missing is not None:
        rule = f"must be a step that the run has trained or will train: 1 to {end}; step {missing} is none"
        raise ConfigError(Problem("--step", f"{first}:{last}" if last != first else first, rule, "name other steps"))
    return [stretch for step in sorted(found) for stretch in found[step]]


def _add(found: dict[int, list[Stretch]], stretch: Stretch, first: int, last: int) -> None:
    for step in range(max(first, stretch.first_step), min(last + 1, stretch.end_step)):
        one = stretch.at(step)
        if all((one.first_sample, one.batch_seqs) != (known.first_sample, known.batch_seqs) for known in found.get(step, [])):
            found.setdefault(step, []).append(one)


def _samples_of(
    stretch: Stretch, config: Config, stream: SampleStream, rank: int | None, tokenizer: TextTokenizer | None
) -> list[dict[str, Any]]:
    """The samples of one step with their documents. Data rank r of d has micro-batches r, r + d, … (pretrain/data/batches.py)."""
    layout = make_layout(config)
    if rank is not None and not 0 <= rank < layout.world_size:
        rule = f"must be a rank of the attempt's world: 0 to {layout.world_size - 1}"
        raise ConfigError(Problem("--rank", rank, rule, "name another rank"))
    wanted = layout.coordinates(rank)["dp"] if rank is not None else None
    found = []
    for place in range(stretch.batch_seqs):
        micro_batch, data_rank = divmod(place // config.batch.micro_batch_seqs, layout.data)
        if wanted is not None and data_rank != wanted:
            continue
        part, number = stream.locate(stretch.first_sample + place)
        source = stream.parts[part]
        spans = source.spans(number)
        documents = [_document(source.index, span, tokenizer) for span in spans]
        room = config.batch.seq_length_tokens + 1 - sum(span.length for span in spans)
        found.append(
            {
                "sample": stretch.first_sample + place,
                "data_rank": data_rank,
                "micro_batch": micro_batch,
                "source": source.index.prefix,
                "part": part,
                "epoch": number // source.samples_per_epoch,
                "documents": documents,
                "room_tokens": room,
            }
        )
    return found


def _document(index: Index, span: Span, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    document = index.document_of(span.sequence)
    begin, end = (index.tokens_before(int(index.documents[document + k])) for k in (0, 1))
    first = index.tokens_before(span.sequence) + span.offset
    found = {"document": document, "offset_tokens": first - begin, "tokens": span.length, "document_tokens": end - begin}
    if tokenizer is None:
        return found
    return found | {"text": tokenizer.decode([int(i) for i in index.tokens()[first : first + span.length]])}


def trace_document(history: RunHistory, file: str, document: int) -> dict[str, Any]:
    """The steps that have read or will read a document. `file`: a prefix, or its last part. Raises ConfigError."""
    data = TracedData(history)
    reads = list(history.stretches())
    reads += history.planned(reads[-1] if reads else None)
    discarded = list(history.discarded())
    windows: dict[str, list[Stretch]] = {}
    for stretch in reads:
        windows.setdefault(data.key_of(stretch.attempt), []).append(stretch)
    sightings, names, length, held_out = [], set(), None, False
    for group in windows.values():
        stream = data.stream(group[0].attempt)
        names |= {part.index.prefix for part in stream.parts}
        for number, part in enumerate(stream.parts):
            if file not in (part.index.prefix, Path(part.index.prefix).name):
                continue
            length = _check_document(part.index, document)
            sequences = range(*(int(part.index.documents[document + k]) for k in (0, 1)))
            held_out |= bool(len(sequences)) and sequences[0] not in part.sequences
            for sequence in sequences if not held_out else ():
                sightings += _sightings(stream, number, sequence, group, reads, discarded)
    if length is None:
        rule = f"must name a file of the run: {', '.join(sorted(names))}"
        raise ConfigError(Problem("--document", file, rule, "write --document FILE:ID, FILE one of these"))
    sightings.sort(key=lambda seen: (seen["sample"], seen["state"]))
    found = {"run_dir": str(history.folder.path), "source": file, "document": document, "document_tokens": length}
    return found | {"held_out": held_out, "seen": sightings}


def _check_document(index: Index, document: int) -> int:
    """The length of the document in tokens. Raises ConfigError."""
    if not 0 <= document < index.num_documents:
        rule = f"must be a document of {index.prefix}: 0 to {index.num_documents - 1}"
        raise ConfigError(Problem("--document", document, rule, "name another document"))
    begin, end = (index.tokens_before(int(index.documents[document + k])) for k in (0, 1))
    return end - begin


def _sightings(
    stream: SampleStream, part: int, sequence: int, group: list[Stretch], reads: list[Stretch], discarded: list[Stretch]
) -> list[dict[str, Any]]:
    """Each sample between the ends of `group` that holds tokens of the sequence, and the step that reads it."""
    source, starts = stream.parts[part], [stretch.first_sample for stretch in reads]
    low, high = group[0].first_sample, group[-1].end_sample
    # Samples before the first step of this data were read by steps of other data, or by none.
    first, last = stream.counts_before(low)[part], stream.counts_before(high)[part]
    found = []
    for epoch in range(first // source.samples_per_epoch, -(-last // source.samples_per_epoch)):
        for number in source.numbers_of(sequence, epoch):
            tokens = sum(span.length for span in source.spans(number) if span.sequence == sequence)
            if not (first <= number < last and tokens):
                continue
            sample = stream.find(part, number)
            stretch = reads[max(bisect_right(starts, sample) - 1, 0)]
            if stretch.first_sample <= sample < stretch.end_sample:
                step, state = stretch.step_of(sample), stretch.state
            else:
                left = next((one for one in discarded if one.first_sample <= sample < one.end_sample), None)
                step, state = (left.step_of(sample), DISCARDED) if left else (None, PASSED_OVER)
            found.append({"step": step, "state": state, "sample": sample, "epoch": epoch, "tokens": tokens})
    return found
