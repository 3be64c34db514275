"""One published row as a job, and its measurements.

In: a row in the format of data/README.md. Out: a PlannedJob, tokens/s and memory; or UnusableRow with the reason. Settings
that a row does not state get these defaults: Megatron's ZeRO-1; one virtual chunk; expert_tensor 1, in Megatron's CI equal to
tensor; flash attention and sequence parallelism from 2022 on; the least recomputation with which the lower bound of the
ledger fits the GPU.

Torch-free.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from configs.model_schema import Model
from parallel.flops import training_flops
from parallel.layout import Layout
from parallel.memory.hardware import PlannedMachine, find_gpu, guess_gpu
from parallel.memory.job import BytesPerParameter, PlannedJob, Recomputation, ZeroSharding
from parallel.memory.ledger import make_ledger
from tools.planner.foreign import PYTORCH_STATES
from tools.planner.published.model import UnusableRow, model_of
from tools.planner.published.parse_words import recompute_of, wide_layers, zero_stage
from tools.planner.published.stack import (
    EAGER_ENGINES,
    dispatcher_of,
    has_casts_apart,
    has_early_flash,
    has_grouped_launch,
    is_compiled,
    is_pytorch,
    logit_bytes,
)

# Before flash attention: their layers write the score matrix, and their gradients don't travel beside the backward pass.
OLD_SOURCES = ("2104.04473", "2205.05198", "bigscience", "core_r0.4.0")
# NICs of machines that differ from the usual, Gbit/s per GPU (8 GPUs share 4 links of 100).
SLOW_NICS = {"4x100Gb": 50.0, "4 Omni-Path": 50.0, "8x100Gb": 100.0, "8x200Gb": 200.0}
# GPUs of a node, by words.
NODE_SIZES = {"two": 2, "four": 4, "2": 2, "4": 4}
# Bridge's recipes of these keep Adam's moments in bf16, and these and fine-tuning the gradients (not stated with the rows:
# the measured bytes leave no room for fp32).
BF16_MOMENTS = ("Moonlight",)
# Kinds of measured memory, by words of the source; allocated by default.
MEMORY_KINDS = {"bigscience": "used", "torchtitan": "reserved"}
# Assumptions about settings that a row does not state; validation counts them.
RECOMPUTE_ASSUMED, PRESET_ASSUMED = "recomputation: the least that fits", "architecture: of the preset of that name"
RECOMPUTE_LADDER = (
    Recomputation(),
    Recomputation("selective", frozenset({"core_attn", "layernorm", "moe_act"})),
    Recomputation("selective", frozenset({"core_attn", "layernorm", "moe_act", "mla_up_proj", "mlp"})),
    Recomputation("full"),
)

COUNTS = ("n_gpus", "tp", "pp", "vpp", "ep", "etp", "cp", "dp", "seq_len", "micro_batch", "global_batch")
MODEL_COUNTS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "topk",
                "moe_ffn_hidden_size", "kv_lora_rank", "q_lora_rank", "v_head_dim")  # fmt: skip
TEXTS = ("id", "source", "gpu", "precision", "recompute", "zero", "notes", "flops_convention", "kind", "task")
MODEL_TEXTS = ("mlp", "attention", "positions", "moe_layer_freq")
OTHER_COUNTS = ("num_experts", "shared_expert_ffn", "first_dense_layers", "mtp_layers", "moe_layers", "qk_nope_head_dim",
                "qk_rope_head_dim", "sliding_window", "sliding_every")  # fmt: skip
LARGEST_COUNT = 1e9
SPEEDS = ("tokens_per_s_per_gpu", "tokens_per_s", "step_time_s", "tflops_per_gpu", "memory_gb", "memory_gib")


def is_malformed(row: dict[str, Any]) -> bool:
    """True when a field that is counted with isn't a whole positive number, text isn't text, or a section isn't a mapping."""
    sections = [row.get(name) for name in ("model", "measured", "derived", "usable")]
    if not all(section is None or isinstance(section, dict) for section in sections):
        return True
    model, measured = row.get("model") or {}, row.get("measured") or {}
    if not isinstance(model.get("args") or {}, dict):
        return True
    counts = [row.get(name) for name in COUNTS] + [model.get(name) for name in MODEL_COUNTS]
    whole = all(value is None or (_is_count(value) and value >= 1) for value in counts)
    whole = whole and all(model.get(name) is None or _is_count(model[name]) for name in OTHER_COUNTS)
    texts = [row.get(name) for name in TEXTS] + [model.get(name) for name in MODEL_TEXTS]
    whole = whole and all(text is None or isinstance(text, str) for text in texts)
    return not whole or not all(measured.get(name) is None or _is_number(measured[name]) for name in SPEEDS)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value == int(value) and value <= LARGEST_COUNT


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def machine_of(text: str, notes: str = "") -> PlannedMachine:
    """The machine of a row's `gpu`."""
    gpu = guess_gpu(text)
    if text.startswith("H100 96GB HBM2e"):
        gpu = find_gpu("H100-SXM-96GB-HBM2e-500W (Meta Grand Teton, torchtitan)")
    if gpu is None:
        raise UnusableRow("GPU not in the table")
    # Nodes of fewer GPUs than usual, as the notes say; a rack (NVL72) is one domain whatever its nodes.
    few = re.search(r"nodes of (\w+)", notes.lower())
    size = NODE_SIZES.get(few[1]) if few and gpu.scaleup_gpus <= 8 else None
    nic = next((value for words, value in SLOW_NICS.items() if words in text), gpu.nic_gbit_s)
    return PlannedMachine(gpu, size or gpu.scaleup_gpus, nic / 8)


def compute_of(text: str | None) -> str:
    words = (text or "bf16").lower()
    if "fp4" in words:
        return "fp4"
    if "fp8" in words or "float8" in words:
        return "fp8"
    return "fp32" if words.startswith(("fp32", "float32", "tf32")) and "/" not in words else "bf16"


def is_old(row: dict[str, Any]) -> bool:
    """Published before flash attention and sequence parallelism were usual."""
    return any(words in str(row.get("source") or "") for words in OLD_SOURCES)


def zero_of(row: dict[str, Any], old: bool) -> tuple[ZeroSharding, BytesPerParameter]:
    text, precision = str(row.get("zero") or "zero-1").lower(), str(row.get("precision") or "")
    stage = zero_stage(text)
    if re.search(r"offload(?!\w*=none)", text):
        raise UnusableRow("offloads to the host")
    if stage == 3 or "fsdp" in text or "shard_grad_op" in text:
        stage = stage or 3
        # Megatron-FSDP shards what Transformer Engine's kernels compute; PyTorch's own comes with PyTorch's kernels.
        return (
            (ZeroSharding("megatron", stage), BytesPerParameter())
            if "megatron" in text
            else (ZeroSharding("fsdp2" if "fsdp2" in text else "fsdp", stage), PYTORCH_STATES)
        )
    name = str((row.get("model") or {}).get("name") or "")
    # One source says "bf16 moments" of runs whose published bytes are those of fp32 ones: only names decide.
    moments = 8 if name.startswith(BF16_MOMENTS) else 12
    short = "16-bit grad" in precision or name.startswith(BF16_MOMENTS) or row.get("task") == "sft"
    states = BytesPerParameter(2, 2 if short else 4, moments)
    if compute_of(row.get("precision")) == "fp32":
        states = BytesPerParameter(4, 4, 8)
    group = re.search(r"within (\d+)", text)
    stage = 1 if stage is None else stage
    return ZeroSharding(
        "deepspeed" if "deepspeed" in text else "megatron", stage, "none", int(group[1]) if group else None, not old
    ), states


def _split(num_layers: int, pipeline: int, chunks: int) -> tuple[int, tuple[int, ...] | None]:
    """(virtual chunks, explicit split): embedding and head may take the place of layers in the outer chunks.

    Where the layers divide, Megatron divides them evenly (ours gives the last stage fewer); else their sources balance them.
    """
    wanted = pipeline * chunks
    if wanted <= num_layers and num_layers % wanted == 0:
        return chunks, (num_layers // wanted,) * wanted
    if wanted <= num_layers:
        return chunks, None
    if wanted <= num_layers + 2:
        empty_last = wanted == num_layers + 2
        return chunks, (0, *[1] * num_layers, *[0] * empty_last)
    return 1, None


def layout_of(row: dict[str, Any], is_moe: bool, is_test: bool) -> Layout:
    n_gpus = row.get("n_gpus")
    tp, pp, cp = (int(row.get(name) or 1) for name in ("tp", "pp", "cp"))
    if n_gpus is None and row.get("dp"):
        n_gpus = int(row["dp"]) * tp * pp * cp
    if n_gpus is None:
        raise UnusableRow("number of GPUs not stated")
    if int(n_gpus) % (tp * pp * cp):
        raise UnusableRow("layout does not fill the GPUs")
    ep = int(row.get("ep") or 1) if is_moe else 1
    usual_etp = tp if is_test else 1
    etp = int(row.get("etp") or usual_etp) if is_moe else 1
    if int(n_gpus) % (ep * etp * pp):
        raise UnusableRow("layout does not fill the GPUs")
    args = (row.get("model") or {}).get("args") or {}
    # Sequence parallelism came in 2022 (Korthikanti et al.).
    sequence = tp > 1 and (not is_old(row) or "+ sequence parallel" in str(row.get("recompute")))
    sequence = sequence and (not is_test or bool(args.get("sequence-parallel")))
    return Layout(tp, sequence, pp, int(row.get("vpp") or 1), cp, ep, etp, int(n_gpus), 1)


def speed_of(row: dict[str, Any], job: PlannedJob) -> float | None:
    """Tokens a second and GPU as measured; from TFLOPs only where the source's way of counting is known."""
    measured, derived = row.get("measured") or {}, row.get("derived") or {}
    world = job.layout.world_size
    if measured.get("tokens_per_s_per_gpu"):
        return float(measured["tokens_per_s_per_gpu"])
    if measured.get("tokens_per_s"):
        return float(measured["tokens_per_s"]) / world
    if measured.get("step_time_s"):
        return job.step_tokens / float(measured["step_time_s"]) / world
    if derived.get("tokens_per_s_per_gpu"):
        return float(derived["tokens_per_s_per_gpu"])
    convention, tflops = str(row.get("flops_convention") or ""), measured.get("tflops_per_gpu")
    if tflops and convention.startswith("causal"):
        return float(tflops) * 1e12 / training_flops(job.model, job.vocab, job.seq_length).per_token
    if tflops and "full attention" in convention and not re.search("hardware|notes|HFU", convention):
        flops = training_flops(job.model, job.vocab, job.seq_length)
        return float(tflops) * 1e12 / (flops.per_token + flops.attention_scores)
    if tflops and convention.startswith("hardware flops with full recompute, full attention"):
        h, s, layers = job.model.hidden_size, job.seq_length, job.model.num_layers
        return float(tflops) * 1e12 / (96 * layers * h * h * (1 + s / (6 * h) + job.vocab / (16 * layers * h)))
    return None


def memory_of(row: dict[str, Any]) -> tuple[float | None, str]:
    measured, source = row.get("measured") or {}, str(row.get("source") or "")
    value = measured.get("memory_gb")
    if value is None and measured.get("memory_gib") is not None:
        value = float(measured["memory_gib"]) * 1.073741824
    notes = str(row.get("notes") or "")
    if re.search(r"memory = [^;]*\bGiB", notes) and measured.get("memory_gib") is None and value is not None:
        value = float(value) * 1.073741824
    kind = next((kind for words, kind in MEMORY_KINDS.items() if words in source), "allocated")
    kind = "reserved" if re.search(r"memory = [^;(]*\breserved", notes) else kind
    return (float(value) if value is not None else None), kind


def _is_small_dense(model: Model) -> bool:
    """Megatron's small CI models run the unfused attention (deterministic mode), whether their arguments say so or not."""
    return model.hidden_size < 1024 and model.moe.num_experts == 0


def job_of(row: dict[str, Any]) -> tuple[PlannedJob, tuple[str, ...]]:
    """(job, what of it is our assumption). Raises Unusable."""
    is_test, old = "tests/functional_tests" in str(row.get("source") or ""), is_old(row)
    model, vocab, of_preset = model_of(row.get("model") or {}, is_test)
    assumed = (PRESET_ASSUMED,) if of_preset else ()
    seq, micro, batch = row.get("seq_len"), row.get("micro_batch"), row.get("global_batch")
    if micro is None:
        raise UnusableRow("micro-batch not stated")
    if seq is None:
        raise UnusableRow("sequence length not stated")
    layout = layout_of(row, model.moe.num_experts > 0, is_test)
    chunks, split = _split(model.num_layers, layout.pipeline, layout.virtual_pipeline if layout.pipeline > 1 else 1)
    layout = replace(layout, virtual_pipeline=chunks)
    if layout.pipeline > model.num_layers:
        raise UnusableRow("layout does not fill the GPUs")
    zero, states = zero_of(row, old)
    precision, compute = str(row.get("precision") or ""), compute_of(row.get("precision"))
    args = (row.get("model") or {}).get("args") or {}
    stated, notes = recompute_of(row.get("recompute"), model, layout.pipeline), str(row.get("notes") or "")
    machine = machine_of(str(row.get("gpu") or ""), notes)
    grouped, pytorch = has_grouped_launch(zero, notes), is_pytorch(zero, notes)
    # Tensor parallel traffic is cut up and sent beside the products since 2022; by PyTorch only where it says so (async TP).
    waits = old or (zero.engine in EAGER_ENGINES and "async" not in notes.lower())
    # Userbuffers reach the GPUs of one operating system, four in an NVL72; Megatron-Bridge's recipes leave them off in nvfp4.
    waits = waits or compute == "fp4" or (machine.domain > 8 and layout.tensor > 4) or "no TP overlap" in notes
    job = PlannedJob(
        model=model, vocab=vocab, layout=layout, machine=machine, seq_length=int(seq),
        micro_batch=int(micro), global_batch=int(batch or int(micro) * layout.data * 4 * layout.pipeline), states=states,
        zero=zero, recompute=stated or Recomputation(), compute=compute,
        flash=not old and args.get("attention-backend") != "unfused" and not (is_test and _is_small_dense(model)), split=split,
        tensor_waits=waits and layout.tensor > 1, expert_overlap="no EP overlap" not in notes if "EP overlap" in notes else None,
        dispatcher=dispatcher_of(row, grouped), eager=pytorch and not is_compiled(row),
        early_flash=pytorch and has_early_flash(machine.gpu, notes), grouped_launch=grouped,
        casts_apart=pytorch and has_casts_apart(precision), experts_only="(experts" in precision,
        wide_layers=wide_layers(precision), logit_bytes=logit_bytes(row, zero, layout.tensor),
    )  # fmt: skip
    if stated is not None:
        return job, assumed
    assumed += (RECOMPUTE_ASSUMED,)
    tries = [replace(job, recompute=each) for each in RECOMPUTE_LADDER]
    return next((each for each in tries if make_ledger(each, 1.0).low_gib <= each.machine.gpu.memory_gib), tries[-1]), assumed
