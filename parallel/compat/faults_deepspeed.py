"""Faults and private parts of DeepSpeed that we guard against or rely on.

Torch-free.
"""

from __future__ import annotations

from parallel.compat.guard import Guard

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_FLAT = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_CUT = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_SWAPPER = "deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper:PartitionedOptimizerSwapper"
_OUR_ENGINE = "parallel.compat.deepspeed.guards:GuardedEngine"
_GUARD_TESTS = "tests/pretrain/engine/test_deepspeed_guards.py"
_START_TESTS = "tests/parallel/compat/test_deepspeed_start.py"
_STATE_TEST = "tests/pretrain/engine/test_deepspeed_state.py::test_stopping_and_going_on_equals_going_through"


def _deepspeed(fault: str, guard: str, symptom: str, test: str, *names: str) -> Guard:
    return Guard(fault, "deepspeed", guard, symptom, test, names)


DEEPSPEED_GUARDS = (
    _deepspeed(
        "Experts that are not DeepSpeed's own are partitioned over the whole data-parallel group",
        "parallel.compat.deepspeed.guards:place_experts",
        "ranks with different experts share one weight: wrong from the first step at stage 3, a TypeError at stage 2",
        f"{_GUARD_TESTS}::test_guard",
        "deepspeed.utils.groups:_EXPERT_PARALLEL_GROUP",
        "deepspeed.utils.groups:_EXPERT_DATA_PARALLEL_GROUP",
        "deepspeed.utils.groups:_EXPERT_PARALLEL_GROUP_RANKS",
        "deepspeed.utils.groups:_EXPERT_DATA_PARALLEL_GROUP_RANKS",
    ),
    _deepspeed(
        "Stage 3 compares the order of its modules with rank 0 of the world",
        "parallel.compat.deepspeed.guards:compare_orders_within",
        "pipeline stages wait for each other for ever",
        f"{_GUARD_TESTS}::test_guard",
        "deepspeed.runtime.zero.partitioned_param_coordinator:assert_ints_same_as_other_ranks",
    ),
    _deepspeed(
        "Stage 3 gathers a weight for its own module only",
        "parallel.compat.deepspeed.guards:gather_tied_embedding",
        "tied embeddings with multi-token prediction end with a RuntimeError: an empty weight",
        f"{_GUARD_TESTS}::test_tied_embeddings_are_gathered_for_prediction_depths",
        "deepspeed.runtime.zero.partition_parameters:register_external_parameter",
    ),
    _deepspeed(
        "The engine does not see MoE layers that are not DeepSpeed's own",
        f"{_OUR_ENGINE}.has_moe_layers",
        "gradients of experts are reduced over ranks that hold other experts",
        f"{_GUARD_TESTS}::test_the_engine_knows_foreign_experts",
        f"{_ENGINE}#has_moe_layers",
    ),
    _deepspeed(
        "Stage 3 refuses MoE models that are not built by DeepSpeed",
        f"{_OUR_ENGINE}._validate_zero3_moe_compatibility",
        "stage 3 ends with an error for every model with experts",
        f"{_GUARD_TESTS}::test_the_engine_knows_foreign_experts",
        f"{_ENGINE}._validate_zero3_moe_compatibility",
    ),
    _deepspeed(
        "bf16 weights with fp32 gradients at stage 1 get BF16_Optimizer",
        f"{_OUR_ENGINE}._do_optimizer_sanity_check",
        "another state, another gradient norm, and no expert groups",
        f"{_GUARD_TESTS}::test_stage_1_in_bf16_is_partitioned_like_the_others",
        f"{_ENGINE}._do_optimizer_sanity_check",
        "deepspeed.runtime.zero.config:ZERO_OPTIMIZATION",
    ),
    _deepspeed(
        "Only a forward pass marks gradients as not yet reduced; a pipeline ends with several backward passes in a row",
        f"{_OUR_ENGINE}._backward_prologue",
        "stage 2: wrong norm, then a crash; stage 3: wrong weights, no error",
        f"{_GUARD_TESTS}::test_guard",
        f"{_ENGINE}._backward_prologue",
        "deepspeed.runtime.base_optimizer:ZeROOptimizer.clear_backward_seen_flag",
    ),
    _deepspeed(
        "The engine updates without asking whether the step may be applied",
        f"{_OUR_ENGINE}._take_model_step",
        "gradients are neither summed over tensor ranks nor clipped, and a step that is not finite is applied",
        "tests/pretrain/engine/test_deepspeed_state.py::test_a_step_that_is_not_finite_changes_nothing",
        f"{_ENGINE}._take_model_step",
    ),
    _deepspeed(
        "Every engine imports DeepSpeed's Muon, whose import starts torch's compiler",
        "parallel.compat.deepspeed.guards:import_muon",
        "1.8 s of CPU more on every rank before the first step",
        f"{_START_TESTS}::test_nothing_is_compiled_by_an_import",
        "deepspeed.runtime.compiler:compile",
    ),
    _deepspeed(
        "DeepSpeed probes compilers for all its operators and compiles one for inference",
        "parallel.compat.deepspeed.start:name_no_operators",
        "linker errors on stderr, and 50 s of compilation once a machine",
        f"{_START_TESTS}::test_no_operator_is_probed",
        "deepspeed.ops:_probe_compatible_ops",
    ),
    _deepspeed(
        "deepspeed.dist is bound by DeepSpeed's own launcher only",
        "parallel.compat.deepspeed.start:bind_communication",
        "the engine ends with an AttributeError at its first collective",
        f"{_START_TESTS}::test_communication_is_bound_without_deepspeeds_launcher",
        "deepspeed:dist",
        "deepspeed:comm",
    ),
    _deepspeed(
        "With managed accumulation above 1, one step() a batch makes no update",
        "pretrain.engine.deepspeed_runtime:engine_settings",
        "weights never change, no error",
        f"{_GUARD_TESTS}::test_guard",
    ),
    _deepspeed(
        "Stage 3: the first backward pass of a step overwrites gradients, the others add",
        "parallel.compat.deepspeed.partition:CutParameters.begin",
        "parameters of another virtual chunk add to the step before's gradients: wrong from the second step, no error",
        f"{_GUARD_TESTS}::test_guard",
        f"{_CUT}#grad_partitions_flat_buffer",
    ),
    _deepspeed(
        "Stage 2 with offload: gradients on the host outlive their step",
        "parallel.compat.deepspeed.partition:FlatGroups.begin",
        "gradients add to the step before's: wrong from the second step, no error",
        f"{_GUARD_TESTS}::test_guard",
        f"{_FLAT}#accumulated_grads_in_cpu",
        f"{_FLAT}#cpu_offload",
    ),
    _deepspeed(
        "Stages 1 and 2 tell nobody which range of which parameter a rank holds",
        "parallel.compat.deepspeed.partition:FlatGroups",
        "checkpoints can neither be written nor read",
        _STATE_TEST,
        *(
            f"{_FLAT}#{name}"
            for name in (
                "single_partition_of_fp32_groups", "partition_size", "real_dp_process_group", "round_robin_bit16_groups",
                "round_robin_bit16_offsets", "averaged_gradients", "all_grad_tensors", "scaled_global_norm", "micro_step_id",
                "_offload_accumulated_param_ids",
            )
        ),
        f"{_FLAT}._release_preflattened_grad_buffers",
        f"{_FLAT}.reset_cpu_buffers",
        f"{_FLAT}.update_lp_params",
    ),
    _deepspeed(
        "Stage 3 tells nobody which range of which parameter a rank holds",
        "parallel.compat.deepspeed.partition:CutParameters",
        "checkpoints can neither be written nor read",
        _STATE_TEST,
        *(
            f"{_CUT}#{name}"
            for name in (
                "fp32_partitioned_groups_flat", "sub_group_process_groups", "fp16_groups", "averaged_gradients",
                "offload_optimizer", "persistent_parameters",
            )
        ),
        *(
            f"{_CUT}.{name}"
            for name in (
                "_get_norm_groups", "_pre_step", "_overflow_clean_up", "_partition_all_parameters",
                "_reassign_or_swap_out_partitioned_parameters",
            )
        ),
    ),
    _deepspeed(
        "Swapped gradients go through files and come back to other places where widths do not fill whole blocks",
        "parallel.compat.deepspeed.swap:SwappedParameters.accept",
        "the update uses other gradients: wrong from the first step, no error",
        "tests/pretrain/engine/test_deepspeed_swap.py::test_widths_that_fill_no_blocks",
        f"{_CUT}#optimizer_swapper",
        f"{_CUT}._finalize_offload_gradient_accumulation",
        f"{_CUT}._swappable_optimizer_subgroup",
        f"{_CUT}._optimizer_states_and_gradient_swap_in",
        f"{_CUT}._optimizer_states_and_gradient_swap_out",
        f"{_CUT}._release_swap_buffers",
        f"{_SWAPPER}#swap_params_info",
    ),
    _deepspeed(
        "Sub-groups below 1 MiB stay in memory",
        "parallel.compat.deepspeed.swap:swap_small_groups",
        "rehearsals of NVMe offload swap nothing",
        "tests/pretrain/engine/test_deepspeed_swap.py::test_the_state_is_in_files",
        "deepspeed.runtime.zero.stage3:PartitionedOptimizerSwapper",
        f"{_SWAPPER}#min_aio_bytes",
    ),
    _deepspeed(
        "DeepSpeed knows no sequence parallelism",
        "pretrain.engine.deepspeed_gradients:sum_over_tensor_ranks",
        "gradients of norms and biases are those of a part of the sequence",
        f"{_GUARD_TESTS}::test_guard",
    ),
    _deepspeed(
        "DeepSpeed knows no copies of the embedding on other pipeline stages",
        "pretrain.engine.deepspeed_gradients:SharedEmbedding.reduce",
        "the first and the last stage update their copies of the embedding differently",
        f"{_GUARD_TESTS}::test_copies_of_the_embedding_guard",
    ),
    _deepspeed(
        "DeepSpeed's gradient norm counts experts wrongly",
        "pretrain.engine.deepspeed_gradients:global_norm",
        "gradients are clipped by another norm",
        "tests/pretrain/engine/test_deepspeed.py::test_layout_changes_nothing",
    ),
)  # fmt: skip
