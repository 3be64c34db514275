"""The check of GPU memory. In: a legal config and its vocabulary size. Out: problems and notices.

The result is a problem when even the lower bound exceeds the GPU's memory, and a notice when the estimate does or is so close
that it may. It is empty when `cluster.gpu` names no GPU of the table, because the memory is then unknown.

Torch-free.
"""

from __future__ import annotations

from configs.errors import Notice, Problem
from configs.schema import Config
from parallel.memory.hardware import find_gpu
from parallel.memory.job import make_job
from parallel.memory.ledger import AT_RISK, UNDER_PLANNED, MemoryLedger, make_ledger

AT_RISK_FIX = (
    "recompute more, lower batch.micro_batch_seqs if it is above 1, or calibrate by a short run; "
    "keep expandable_segments:True, which `phalanx launch` sets against fragmentation"
)
FIX = "see `phalanx plan` for what would fit, and `phalanx plan --search` for the best layouts"


def memory_verdict(config: Config, vocab_size: int | None) -> tuple[list[Problem], list[Notice]]:
    """(problems, notices) of a legal config. `vocab_size` None: the vocabulary is unknown, and nothing is checked."""
    if vocab_size is None or config.cluster.gpu is None or find_gpu(config.cluster.gpu) is None:
        return [], []
    ledger = make_ledger(make_job(config, vocab_size))
    if ledger.low_gib > ledger.capacity_gib:
        rule = f"stage {ledger.fullest.stage} needs at least {ledger.low_gib:.1f} GiB a GPU ({_parts(ledger)})"
        rule += f"; {config.cluster.gpu} has {ledger.capacity_gib:.1f}"
        return [Problem("parallel", f"{ledger.peak_gib:.1f} GiB estimated", rule, FIX)], []
    if not ledger.fits:
        text = f"stage {ledger.fullest.stage} is estimated to need {ledger.peak_gib:.1f} GiB of {ledger.capacity_gib:.1f} "
        text += f"({_parts(ledger)}), at least {ledger.low_gib:.1f}: it may run out of memory; {FIX}"
        return [], [Notice("parallel", text)]
    if ledger.verdict == AT_RISK:
        return [], [Notice("parallel", at_risk_text(ledger))]
    return [], []


def at_risk_text(ledger: MemoryLedger) -> str:
    """What a plan that fits closely risks, and what helps."""
    return (
        f"at risk of running out of memory: stage {ledger.fullest.stage} is estimated to need {ledger.peak_gib:.1f} GiB of "
        f"{ledger.capacity_gib:.1f}; one in ten published runs took over {UNDER_PLANNED:.0%} more than planned, which would be "
        f"{ledger.risk_gib:.1f}; {AT_RISK_FIX}"
    )


def _parts(ledger: MemoryLedger) -> str:
    rank = ledger.fullest
    return (
        f"weights {rank.weights_gib:.1f}, gradients {rank.gradients_gib:.1f}, optimizer {rank.optimizer_gib:.1f}, "
        f"activations {rank.activations_gib:.1f}, buffers {rank.buffers_gib:.1f}"
    )
