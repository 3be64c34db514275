"""The one process that a layout is compared with: the same model and global batches, nothing sharded.

Most losses are means over tokens or sequences: it makes no difference how the global batch is cut into micro-batches, so the
reference takes one sequence at a time, and a layout with larger micro-batches must agree with it. Two losses are not linear in
the cut, and their reference is cut like the layout:
- `aux_loss` balances the load within each micro-batch;
- `global_aux_loss` adds up the load from micro-batch to micro-batch, of all data parallel ranks at once.

Torch-free.
"""

from __future__ import annotations

from copy import deepcopy

from configs.schema import Config, Zero
from parallel.layout import make_layout
from tools.rehearse.shrink import CommonDivisors, shrink


def reference_micro_batch_seqs(config: Config) -> int:
    """Sequences of one micro-batch of the reference for this layout."""
    moe, micro_batch_seqs = config.model.moe, config.batch.micro_batch_seqs
    if not moe.num_experts or moe.router.aux_loss_coeff == 0:
        return 1
    data = make_layout(config).data
    return {"aux_loss": micro_batch_seqs, "global_aux_loss": micro_batch_seqs * data}.get(moe.router.balance, 1)


def reference_key(config: Config) -> tuple[int, str, float | None]:
    """Layouts with equal keys have one reference: the same micro-batch, and the same update by Muon."""
    muon = config.optimizer.muon
    return reference_micro_batch_seqs(config), muon.split_heads, muon.qk_clip


def reference_of(config: Config, common: CommonDivisors) -> Config:
    """The config of the reference for this layout."""
    single = deepcopy(config)
    parallel = single.parallel
    parallel.tensor = parallel.pipeline = parallel.context = parallel.expert = parallel.expert_tensor = 1
    parallel.virtual_pipeline, parallel.sequence, parallel.pipeline_split = None, None, None
    parallel.overlap_expert_comm = False
    single.launch.nodes = single.launch.processes_per_node = 1
    single.zero = Zero(engine="megatron", stage=0)
    single.batch.micro_batch_seqs = reference_micro_batch_seqs(config)
    return shrink(single, common)
