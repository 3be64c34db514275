"""Batch arithmetic: closed forms equal stepping through, and megatron-core's own ramp."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator

from configs.load import load_config
from configs.schema import Batch, BatchRamp
from parallel.batch import (
    consumed_seqs_after,
    deciding_batches,
    global_batch_at,
    horizon_steps,
    num_micro_batches,
    plateaus,
    steps_for,
    steps_of,
)

ramps = st.builds(
    lambda start, increment, count, samples: Batch(
        global_batch_seqs=start + increment * count, ramp=BatchRamp(start, increment, samples)
    ),
    st.integers(1, 20), st.integers(1, 9), st.integers(1, 12), st.integers(1, 3000),
)  # fmt: skip


@given(batch=ramps)
@settings(max_examples=100, deadline=None)
def test_closed_forms_equal_stepping_through(batch: Batch) -> None:
    consumed = 0
    for step in range(200):
        assert consumed_seqs_after(batch, step) == consumed
        size = global_batch_at(batch, consumed)
        for wanted in {consumed + 1, consumed + size}:
            assert steps_for(batch, wanted) == step + 1
        consumed += size
    sizes = [plateau.global_batch_seqs for plateau in plateaus(batch)]
    assert sizes == sorted(set(sizes)) and sizes[-1] == batch.global_batch_seqs


@given(batch=ramps)
@settings(max_examples=50, deadline=None)
@pytest.mark.skipif(
    not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"), reason="megatron-core 0.18 has none"
)
def test_the_ramp_is_megatrons(batch: Batch) -> None:
    ramp, start = batch.ramp, batch.ramp.start_seqs or 0
    theirs = num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator(
        batch.global_batch_seqs, 1, 1, False, 1, start, ramp.increment_seqs, ramp.samples
    )  # fmt: skip
    increments = (batch.global_batch_seqs - start) // ramp.increment_seqs
    for consumed in range(0, ramp.samples + 50, 7):
        theirs.update(consumed, consistency_check=False, verbose=False)
        # Where a boundary is no whole sequence megatron divides floats; elsewhere both agree to the sequence.
        if consumed * increments % ramp.samples:
            assert theirs.get_current_global_batch_size() == global_batch_at(batch, consumed)


@given(batch=ramps, divisor=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_deciding_batches_stand_for_all_batches_of_a_ramp(batch: Batch, divisor: int) -> None:
    ramp = batch.ramp
    every = range(ramp.start_seqs or 0, batch.global_batch_seqs + 1, ramp.increment_seqs)
    assert all(size % divisor == 0 for size in deciding_batches(batch)) == all(size % divisor == 0 for size in every)


def test_without_a_ramp() -> None:
    batch = Batch(global_batch_seqs=12, micro_batch_seqs=2)
    assert global_batch_at(batch, 0) == 12 and consumed_seqs_after(batch, 5) == 60
    assert [steps_for(batch, seqs) for seqs in (1, 12, 13)] == [1, 1, 2]
    assert num_micro_batches(batch, 3, 12) == 2
    with pytest.raises(AssertionError, match="check_config comes first"):
        num_micro_batches(batch, 5, 12)


def test_steps_of_a_run() -> None:
    def config(*words: str):
        return load_config("quickstart", ["batch.global_batch_seqs=8", "batch.seq_length_tokens=100", *words]).config

    assert steps_of(config("run.steps=7")) == 7
    assert steps_of(config("run.steps=null", "run.tokens=800")) == 1
    assert steps_of(config("run.steps=null", "run.tokens=801")) == 2
    ramp = ["batch.ramp.start_seqs=2", "batch.ramp.increment_seqs=2", "batch.ramp.samples=12"]
    # Increments at 4, 8 and 12 sequences: steps of 2, 2, 4, 6, then 8.
    assert steps_of(config("run.steps=null", "run.tokens=1400", *ramp)) == 4
    assert steps_of(config("run.steps=null", "run.tokens=1401", *ramp)) == 5
    assert horizon_steps(config("run.steps=7")) == 7
    assert horizon_steps(config("run.steps=7", "schedule.horizon_steps=20")) == 20
