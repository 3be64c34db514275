"""Rules of the engine, ZeRO, precision and recomputation. Config in, problems out.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from configs.errors import Problem
from configs.schema import Config
from parallel import architecture as arch
from parallel.legality.rules import has_experts, on_gpu, reads
from parallel.legality.zero_table import REFUSED, STAGES, applying


@reads("zero.engine", "zero.stage")
def engine_has_stage(config: Config) -> Iterator[Problem]:
    """The engine has the ZeRO stage: megatron 0 and 1, deepspeed 0 to 3."""
    zero = config.zero
    if zero.stage not in STAGES[zero.engine]:
        rule = "the megatron engine shards optimizer state only: stage 0 or 1; 2 and 3 are deepspeed's"
        yield Problem("zero.stage", zero.stage, rule, "set zero.stage=1, or zero.engine=deepspeed")


@reads("zero", "parallel", "precision", "model.tie_embeddings", "model.mtp", "model.mla", "recompute.mode")
def zero_goes_with(config: Config) -> Iterator[Problem]:
    """The table of engines, ZeRO stages and offload (parallel/legality/zero_table.py) does not refuse a feature of the run."""
    for feature, entry in applying(config):
        if entry.verdict == REFUSED:
            got = attrgetter(feature.path)(config)
            yield Problem(feature.path, got, f"{entry.why} (zero.engine = {config.zero.engine})", entry.fix)


@reads("zero")
def offload_has_a_place(config: Config) -> Iterator[Problem]:
    """Offload to NVMe names a folder, and keys of offload are unset without offload."""
    zero = config.zero
    if zero.offload != "none" and zero.offload_device == "nvme" and not zero.nvme_path:
        yield Problem("zero.nvme_path", zero.nvme_path, "zero.offload_device = nvme needs a folder", "set zero.nvme_path")
    if zero.offload == "none" and (zero.offload_device == "nvme" or zero.nvme_path):
        path = "zero.offload_device" if zero.offload_device == "nvme" else "zero.nvme_path"
        got = zero.offload_device if zero.offload_device == "nvme" else zero.nvme_path
        yield Problem(path, got, "has no effect while zero.offload = none", "set zero.offload=optimizer, or leave it out")


@reads("zero", "model.tie_embeddings", "model.mtp", "parallel.pipeline")
def overlap_fits(config: Config) -> Iterator[Problem]:
    """Overlapped gradient reduction needs a gradient of every weight of a stage in that stage's own backward pass; weights are
    gathered during the forward pass only where gradients are reduced during the backward pass.
    """
    zero, model = config.zero, config.model
    if zero.overlap_grad_reduce and model.tie_embeddings and model.mtp.num_layers and config.parallel.pipeline > 1:
        rule = (
            "can't run with model.tie_embeddings and multi-token prediction over several stages: megatron-core waits for a "
            "gradient of the output layer, which computes with the embedding"
        )
        yield Problem("zero.overlap_grad_reduce", True, rule, "set zero.overlap_grad_reduce=false")
    if zero.overlap_param_gather and not zero.overlap_grad_reduce:
        rule = "needs zero.overlap_grad_reduce: weights are gathered bucket by bucket as gradients were reduced"
        yield Problem("zero.overlap_param_gather", True, rule, "set zero.overlap_grad_reduce=true")


@reads("parallel", "precision.params", "recompute", "model", "zero.engine")
def expert_overlap_fits(config: Config) -> Iterator[Problem]:
    """parallel.overlap_expert_comm meets every need of `expert_overlap_problems`."""
    if config.parallel.overlap_expert_comm:
        yield from expert_overlap_problems(config)


def expert_overlap_problems(config: Config) -> Iterator[Problem]:
    """Needs of Megatron-Core's overlap_moe_expert_parallel_comm that the config does not meet, whatever the key's value.

    The feature sends tokens to experts while another micro-batch computes. It runs layers in parts, in its own schedule.
    """
    model, p, recompute = config.model, config.parallel, config.recompute
    dropped = recompute.modules if recompute.mode == "selective" else []
    several_chunks, depths = (p.virtual_pipeline or 1) > 1, model.mtp.num_layers
    needs = (
        (has_experts(config) and p.expert > 1, "tokens that travel: parallel.expert > 1", "set parallel.expert"),
        # megatron-core 0.16.1 frees the tokens that arrived, which a lone expert reads without a copy in its order.
        (
            model.moe.num_experts > p.expert,
            "several experts a rank: model.moe.num_experts > parallel.expert",
            "lower parallel.expert",
        ),
        (p.pipeline == 1 or several_chunks, "several chunks a stage where there are stages", "set parallel.virtual_pipeline"),
        (config.precision.params == "bf16" or not on_gpu(config), "precision.params = bf16 on a GPU", "set it"),
        (config.zero.engine == "megatron", "zero.engine = megatron: DeepSpeed would not see layers run in parts", "set it"),
        (recompute.mode != "full", "layers that are not recomputed as a whole", "set recompute.mode=selective or none"),
        ("moe" not in dropped, "MoE layers that are not recomputed as a whole", "leave moe out of recompute.modules"),
        (model.moe.dispatcher != "allgather", "the alltoall or flex dispatcher", "set model.moe.dispatcher=alltoall"),
        (model.norm_position == "before", "norms before attention and MLP: it runs MLPs in parts", "set model.norm_position"),
        (not model.moe.shared_overlap, "model.moe.shared_overlap = false", "set it"),
        (depths < 2, "at most one depth of multi-token prediction", "set model.mtp.num_layers=1"),
        (not depths or p.pipeline > 1, "stages for multi-token prediction", "set parallel.pipeline"),
        (not depths or arch.moe_layers(model)[-1], "a MoE layer for multi-token prediction", "set model.mtp.num_layers=0"),
    )
    for holds, what, fix in needs:
        if not holds:
            yield Problem("parallel.overlap_expert_comm", True, f"needs {what}", f"{fix}, or parallel.overlap_expert_comm=false")


@reads("precision")
def gradient_precision(config: Config) -> Iterator[Problem]:
    """fp32 weights have fp32 gradients."""
    precision = config.precision
    if precision.grads == "bf16" and precision.params == "fp32":
        rule = "gradients can't be coarser than the weights they belong to: precision.params = fp32"
        yield Problem("precision.grads", "bf16", rule, "set precision.grads=fp32, or precision.params=bf16")


@reads("precision", "cluster")
def fp8_needs_gpu(config: Config) -> Iterator[Problem]:
    """fp8 products need a GPU and bf16 weights."""
    precision = config.precision
    if precision.fp8 == "none":
        return
    if not on_gpu(config):
        rule = "needs a GPU with Transformer Engine"
        yield Problem(
            "precision.fp8", precision.fp8, rule, "set precision.fp8=none, or name cluster.gpu (or cluster.device=cuda)"
        )
    if precision.params != "bf16":
        rule = "fp8 products need precision.params = bf16 around them"
        yield Problem("precision.fp8", precision.fp8, rule, "set precision.params=bf16, or precision.fp8=none")


@reads("precision", "model", "parallel.tensor", "parallel.expert_tensor")
def fp8_widths(config: Config) -> Iterator[Problem]:
    """fp8 products need widths in multiples of 16 on each rank, and a dispatcher that can pad tokens."""
    model, p = config.model, config.parallel
    if config.precision.fp8 == "none":
        return
    kinds = arch.moe_layers(model)
    widths = {"model.hidden_size": model.hidden_size}
    if not all(kinds):
        widths["model.ffn_hidden_size"] = arch.ffn(model) // p.tensor
    if arch.has_delta_net(model):
        widths["model.delta_net"] = arch.delta_widths(model).projected // p.tensor
    if any(kinds):
        widths["model.moe.ffn_hidden_size"] = arch.expert_ffn(model) // p.expert_tensor
    for path, width in widths.items():
        if width % 16:
            rule = "fp8 products need widths in multiples of 16 on each rank"
            yield Problem(path, width, rule, "change the width or the degree, or set precision.fp8=none")
    if has_experts(config) and model.moe.dispatcher == "allgather":
        rule = "fp8 pads each expert's tokens, which the allgather dispatcher can't"
        yield Problem("model.moe.dispatcher", "allgather", rule, "set model.moe.dispatcher=alltoall")


@reads("recompute", "model.moe", "model.mla", "model.delta_net", "model.mlp_bias", "model.num_layers", "precision")
def recompute_modules(config: Config) -> Iterator[Problem]:
    """Selective recomputation names parts that the model has and that can be recomputed."""
    recompute, model = config.recompute, config.model
    if recompute.mode != "selective":
        return
    path = "recompute.modules"
    if not recompute.modules:
        yield Problem(path, [], "recompute.mode = selective needs a part to recompute", "set recompute.modules=[core_attn]")
    kinds = arch.moe_layers(model)
    needs = {
        "mla_up_proj": (arch.is_mla(model), "latent attention (model.mla.kv_lora_rank)"),
        "moe": (any(kinds), "a MoE layer"),
        "moe_act": (any(kinds) and model.moe.grouped_gemm != "off", "experts with grouped products (model.moe.grouped_gemm)"),
        "shared_experts": (bool(model.moe.shared_ffn_hidden_size), "a shared expert (model.moe.shared_ffn_hidden_size)"),
        "mlp": (not all(kinds), "a dense layer"),
        "core_attn": (not all(arch.delta_layers(model)), "a layer with attention (model.delta_net.pattern)"),
    }
    for module in recompute.modules:
        has, what = needs.get(module, (True, ""))
        if not has:
            yield Problem(path, recompute.modules, f"{module} needs {what}", f"leave {module} out")
    if "mlp" in recompute.modules and model.mlp_bias and not all(kinds):
        # megatron-core 0.16.1 hands the bias itself out of the recomputed part: autograd takes it for a result, and each
        # backward pass runs through all passes before, twice as many a layer. It stands still, without an error.
        rule = "mlp can't be recomputed with biases (model.mlp_bias): megatron-core's backward pass never ends"
        yield Problem(path, recompute.modules, rule, "leave mlp out, or set recompute.mode=full")
    if "shared_experts" in recompute.modules and model.moe.shared_overlap:
        rule = "shared_experts can't be recomputed while model.moe.shared_overlap runs them beside the dispatcher"
        yield Problem(path, recompute.modules, rule, "leave shared_experts out, or set model.moe.shared_overlap=false")
    delayed = config.precision.fp8 != "none" and config.precision.fp8_recipe == "delayed"
    if delayed and {"moe_act", "layernorm"} & set(recompute.modules):
        rule = "moe_act and layernorm can't be recomputed with precision.fp8_recipe = delayed"
        yield Problem(path, recompute.modules, rule, "leave them out, or set precision.fp8_recipe=tensorwise")


@reads("recompute", "model.num_layers", "model.mtp", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.pipeline_split")
def recompute_layers(config: Config) -> Iterator[Problem]:
    """Full recomputation names at most the layers of the longest chunk, and one layer with multi-token prediction."""
    recompute, model, p = config.recompute, config.model, config.parallel
    if recompute.mode != "full":
        return
    longest = -(-model.num_layers // (p.pipeline * (p.virtual_pipeline or 1)))
    if p.pipeline_split:
        longest = max(p.pipeline_split)
    if recompute.num_layers > longest:
        rule = f"must be at most {longest}, the layers of the longest chunk"
        yield Problem("recompute.num_layers", recompute.num_layers, rule, f"set recompute.num_layers={longest} or less")
    if model.mtp.num_layers and recompute.method == "uniform" and recompute.num_layers != 1:
        rule = "must be 1 with multi-token prediction: each depth is recomputed by itself"
        yield Problem("recompute.num_layers", recompute.num_layers, rule, "set recompute.num_layers=1")


RULES = (
    engine_has_stage,
    zero_goes_with,
    offload_has_a_place,
    overlap_fits,
    expert_overlap_fits,
    gradient_precision,
    fp8_needs_gpu,
    fp8_widths,
    recompute_modules,
    recompute_layers,
)
