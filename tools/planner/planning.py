"""One layout's plan: memory, time and speed together.

In: a PlannedJob, maybe a calibration. Out: a `Plan`, as JSON what DESIGN.md says `phalanx plan --json` prints.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.schema import Config
from parallel.flops import count_parameters, training_flops
from parallel.legality.engine import expert_overlap_problems
from parallel.legality.experts import may_be_flex
from parallel.memory.hardware import HOST_NAME
from parallel.memory.job import PlannedJob
from parallel.memory.ledger import MemoryLedger, RankMemory, make_ledger
from tools.planner.timing import Timing, time_step


@dataclass(frozen=True)
class Calibration:
    """A user's machine over ours: measured / predicted step time, and peak memory."""

    time_scale: float = 1.0
    memory_scale: float = 1.0
    source: str = ""


UNCALIBRATED = Calibration()


@dataclass(frozen=True)
class Plan:
    """What a job takes. Speeds per GPU; mfu over the dense bf16 peak, model FLOPs without recomputation."""

    job: PlannedJob
    ledger: MemoryLedger
    timing: Timing
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    mfu: float

    @property
    def fits(self) -> bool:
        return self.ledger.fits

    def time_dict(self) -> dict[str, object]:
        return {
            "step_s": round(self.timing.step_s, 6),
            "tokens_per_s_per_gpu": round(self.tokens_per_s_per_gpu, 3),
            "tflops_per_gpu": round(self.tflops_per_gpu, 3),
            "mfu": round(self.mfu, 5),
            "bubble_fraction": round(self.timing.bubble_fraction, 5),
            "breakdown_s": {name: round(value, 6) for name, value in self.timing.breakdown_s.items()},
        }

    def as_dict(self) -> dict[str, object]:
        return {
            "layout": self.job.layout.degrees() | {"num_micro_batches": self.job.num_micro_batches},
            "memory": self.ledger.as_dict(),
            "time": self.time_dict(),
            "fits": self.fits,
        }


def _slower_s(plan: Plan, changed: PlannedJob) -> float:
    """How much longer a step of the changed job takes, calibrated as the plan is; 0 where that is within half a percent."""
    step_s = plan.timing.step_s
    slower_s = step_s / time_step(plan.job).step_s * time_step(changed).step_s - step_s
    return slower_s if abs(slower_s) > 0.005 * step_s else 0.0


def tensor_overlap_note(plan: Plan) -> str | None:
    """What Megatron-Core's tp_comm_overlap would save. It needs Transformer Engine's communicators; our engines leave it off."""
    job = plan.job
    if job.machine.gpu.name == HOST_NAME or not job.tensor_waits:
        return None
    saved_s = -_slower_s(plan, replace(job, tensor_waits=False))
    if saved_s <= 0:
        return None
    return f"products wait for tensor parallel traffic; tuned Megatron-Core runs hide it (-{saved_s:.3g} s), our engines don't"


def expert_overlap_note(plan: Plan, config: Config) -> str | None:
    """What parallel.overlap_expert_comm would save, where it is off and may be on."""
    job = plan.job
    if job.machine.gpu.name == HOST_NAME or config.parallel.overlap_expert_comm or any(expert_overlap_problems(config)):
        return None
    saved_s = -_slower_s(plan, replace(job, expert_overlap=True))
    if saved_s <= 0:
        return None
    return f"parallel.overlap_expert_comm=true: tokens travel over the NIC behind another micro-batch (-{saved_s:.3g} s)"


def dispatcher_note(plan: Plan, config: Config) -> str | None:
    """What the flex dispatcher would save, where it may be."""
    job = plan.job
    if job.sends_once or not may_be_flex(config):
        return None
    saved_s = -_slower_s(plan, replace(job, dispatcher="flex"))
    if saved_s <= 0:
        return None
    how = "a token goes once to each rank, not once for each of its experts"
    return f"model.moe.dispatcher=flex: {how} (-{saved_s:.3g} s); needs DeepEP or HybridEP on the GPUs"


def savings(plan: Plan, config: Config) -> list[str]:
    """What single settings would save, and what our engines leave out."""
    notes = (tensor_overlap_note(plan), expert_overlap_note(plan, config), dispatcher_note(plan, config))
    return [note for note in notes if note]


def model_dict(job: PlannedJob) -> dict[str, object]:
    """Parameters and FLOPs a token of the job's model."""
    parameters = count_parameters(job.model, job.vocab)
    return {
        "params_total": parameters.total,
        "params_active": parameters.active,
        "flops_per_token": training_flops(job.model, job.vocab, job.seq_length).per_token,
    }


def _scaled(rank: RankMemory, scale: float) -> RankMemory:
    """A rank whose activations and buffers take what the calibration adds."""
    added = (scale - 1.0) * rank.allocated_gib
    return replace(rank, buffers_gib=rank.buffers_gib + added, low_gib=rank.low_gib + added, high_gib=rank.high_gib + added)


def make_plan(job: PlannedJob, calibration: Calibration = UNCALIBRATED, flops_per_token: float | None = None) -> Plan:
    """Memory and time of a job. `flops_per_token` saves counting them again for each layout of a search."""
    ledger = make_ledger(job)
    if calibration.memory_scale != 1.0:
        ledger = MemoryLedger(tuple(_scaled(rank, calibration.memory_scale) for rank in ledger.ranks), ledger.capacity_gib)
    timing = time_step(job, scale=calibration.time_scale)
    flops = flops_per_token or training_flops(job.model, job.vocab, job.seq_length).per_token
    speed = job.step_tokens / timing.step_s / job.layout.world_size
    tflops = speed * flops / 1e12
    return Plan(job, ledger, timing, speed, tflops, tflops / job.machine.gpu.bf16_tflops)
