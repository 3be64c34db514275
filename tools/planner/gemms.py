"""The products of one layer on a rank, by shape.

In: a PlannedJob. Out: `Gemm`s: rows x inner x columns. Legend: t tokens of a micro-batch on a rank, h hidden.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel import architecture as arch
from parallel.memory.job import PlannedJob


@dataclass(frozen=True)
class Gemm:
    """One product of a layer on a rank: rows x inner x columns; `count` alike (local experts)."""

    rows: float
    inner: float
    columns: float
    count: float = 1.0

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns * self.count

    def traffic(self, size: float) -> float:
        """Bytes read and written, forward; `rows` are all experts' together divided among `count`."""
        return self.count * size * (self.rows * (self.inner + self.columns) + self.inner * self.columns)


def attention_gemms(job: PlannedJob) -> list[Gemm]:
    """Products of one layer's attention on a rank."""
    model, tp, t = job.model, job.layout.tensor, job.micro_tokens
    h, heads, mla = model.hidden_size, model.attention.num_heads, model.mla
    out = Gemm(t, heads * arch.value_dim(model) / tp, h)
    if mla.kv_lora_rank is None:
        return [Gemm(t, h, arch.qkv_rows(model) / tp), out]
    split = tp if job.layout.sequence else 1
    query = heads * arch.query_dim(model) / tp
    down = Gemm(t / split, h, mla.kv_lora_rank + mla.qk_rope_head_dim)
    up = Gemm(t, mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim) / tp)
    if mla.q_lora_rank is None:
        return [Gemm(t, h, query), down, up, out]
    return [Gemm(t / split, h, mla.q_lora_rank), Gemm(t, mla.q_lora_rank, query), down, up, out]


def indexer_gemms(job: PlannedJob) -> list[Gemm]:
    """Projections of one layer's indexer, which every tensor rank computes whole; none without one."""
    model, dsa, t, h = job.model, job.model.dsa, job.micro_tokens, job.model.hidden_size
    if not arch.is_sparse(model):
        return []
    queries = Gemm(t, model.mla.q_lora_rank or h, dsa.num_index_heads * dsa.index_head_dim)
    return [queries, Gemm(t, h, dsa.index_head_dim), Gemm(t, h, dsa.num_index_heads)]


def delta_net_gemms(job: PlannedJob) -> list[Gemm]:
    """Projections of one layer's gated delta net on a rank."""
    widths, tp, t, h = arch.delta_widths(job.model), job.layout.tensor, job.micro_tokens, job.model.hidden_size
    return [Gemm(t, h, widths.projected / tp), Gemm(t, widths.value / tp, h)]


def mlp_gemms(job: PlannedJob, width: float, rows: float, parts: int, count: float = 1.0) -> list[Gemm]:
    """Both products of an MLP, or of `count` local experts that share `rows` tokens."""
    h, gate = job.model.hidden_size, 2 if arch.is_gated(job.model) else 1
    return [Gemm(rows / count, h, gate * width / parts, count), Gemm(rows / count, width / parts, h, count)]


def routed_rows(job: PlannedJob) -> float:
    """Token copies that a rank's experts work on in a micro-batch, routing balanced."""
    layout = job.layout
    return job.micro_tokens * job.model.moe.top_k * layout.expert_tensor / layout.tensor
