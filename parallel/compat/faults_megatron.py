"""Faults and private parts of Megatron-Core that we guard against or rely on.

Torch-free.
"""

from __future__ import annotations

from parallel.compat.guard import Guard

_PARITY = "tests/pretrain/model/test_parity.py"
_LAYOUT_TEST = f"{_PARITY}::test_layout_changes_nothing"
_BALANCE_TEST = "tests/parallel/compat/test_router_losses.py::test_each_balancing_loss_acts_as_its_formula_says"
_PREDICTION = "megatron.core.transformer.multi_token_prediction"
_PREDICTION_TEST = "tests/parallel/compat/test_megatron_guards.py::test_prediction_losses_are_means_over_valid_tokens"
_ROUTER = "megatron.core.transformer.moe.router:TopKRouter"


def _megatron(
    fault: str, guard: str, symptom: str, test: str, *names: str, first: str | None = None, last: str | None = None
) -> Guard:
    return Guard(fault, "megatron-core", guard, symptom, test, names, first, last)


MEGATRON_GUARDS = (
    _megatron(
        "Megatron-Core calls torch.cuda at import and in every step",
        "parallel.compat.megatron_cpu:rewrite",
        "no run and no rehearsal without a GPU",
        "tests/parallel/compat/test_megatron_cpu.py::test_modules_run_on_the_cpu_and_torch_is_untouched",
    ),
    _megatron(
        "Gradients of experts are reduced and counted over the wrong ranks with tensor > 1",
        "parallel.compat.megatron_guards:mark_expert_parameters",
        "wrong gradients of experts and a wrong norm from the first step, no error",
        f"{_PARITY}::test_expert_guard",
    ),
    _megatron(
        "The router's jitter is added during validation too",
        "parallel.compat.megatron_guards:without_jitter",
        "the validation loss is noisy, and each validation changes the random numbers of training",
        f"{_PARITY}::test_jitter_guard",
        "megatron.core.transformer.transformer_config:TransformerConfig.moe_input_jitter_eps",
    ),
    _megatron(
        "Router losses are weighted by the rank's own tokens when the loss is a sum over tokens",
        "parallel.compat.megatron_guards:router_loss_weight",
        "gradients of router losses are too small by tensor x context, no error",
        f"{_PARITY}::test_router_losses_guard",
        last="0.18",
    ),
    _megatron(
        "The balancing loss of sequences is weighted by the tokens of one sequence",
        "parallel.compat.router_losses:weigh_router_losses",
        "the gradient of seq_aux_loss is too small by the sequences of a micro-batch, no error",
        _BALANCE_TEST,
        f"{_ROUTER}.attach_and_log_load_balancing_loss",
        last="0.18",
    ),
    _megatron(
        "The balancing loss of the global batch is weighted by the tokens of one data parallel rank",
        "parallel.compat.router_losses:weigh_router_losses",
        "the gradient of global_aux_loss is too small by the data parallel degree, no error",
        _BALANCE_TEST,
        f"{_ROUTER}.attach_and_log_load_balancing_loss",
    ),
    _megatron(
        "YaRN ignores rotary_percent",
        "parallel.compat.megatron_guards:yarn_on_part_of_head",
        "whole heads are rotated where the model rotates a part of each, no error",
        "tests/parallel/compat/test_megatron_guards.py::test_yarn_turns_the_asked_part_of_each_head",
    ),
    _megatron(
        "Column-parallel down projections of latent attention get a wrong gradient with tensor > 1",
        "pretrain.model.specs:_attention_spec",
        "gradient norm 1.09392 where 1.09504 is right, no error",
        f"{_PARITY}::test_latent_attention_guard",
    ),
    _megatron(
        "Latent attention replaces the modules that its spec names where queries come from no latent vector",
        "pretrain.model.specs:LatentAttention",
        "DeepSeek-V2-Lite can't be built without Transformer Engine, and has a norm too many with it",
        "tests/tools/convert/test_families.py::test_round_trip_and_logits",
        "megatron.core.transformer.multi_latent_attention:MLASelfAttention._resolve_qk_norm_config",
        first="0.19",
    ),
    _megatron(
        "The local norm refuses sequence parallelism",
        "pretrain.model.specs:Norm",
        "tensor > 1 ends with an assertion on the CPU",
        "tests/parallel/compat/test_megatron_guards.py::test_the_local_norm_refuses_sequence_parallelism",
    ),
    _megatron(
        "The local backend builds norms and attention that lack sequence parallelism, MLA, sinks and context parallelism",
        "pretrain.model.specs:CpuSpecProvider",
        "no layout with context > 1 and no MLA model on the CPU",
        _LAYOUT_TEST,
        "megatron.core.models.backends:LocalSpecProvider.layer_norm",
        "megatron.core.models.backends:LocalSpecProvider.core_attention",
    ),
    _megatron(
        "Padded vocabulary entries take part in the softmax",
        "pretrain.model.gpt:PaddedVocabGPT.compute_language_model_loss",
        "the loss depends on model.vocab_multiple",
        f"{_PARITY}::test_padding_of_the_vocabulary_changes_nothing",
        "megatron.core.models.gpt.gpt_model:GPTModel.compute_language_model_loss",
    ),
    _megatron(
        "A GPTModel reads YaRN's settings from names that TransformerConfig does not declare",
        "pretrain.model.megatron_config:make_transformer_config",
        "a model with YaRN ends with an AttributeError",
        "tests/parallel/compat/test_megatron_guards.py::test_yarn_settings_reach_the_model",
    ),
    _megatron(
        "The expert bias moves during the backward pass, before a step is accepted",
        "pretrain.engine.megatron:MegatronEngine.step",
        "a refused step leaves a moved expert bias",
        "tests/pretrain/test_refused_steps.py::test_a_refused_step_moves_nothing",
    ),
    _megatron(
        "The distributed optimizer tells nobody which range of which parameter a rank holds",
        "parallel.compat.megatron_private:sharded_main",
        "checkpoints can neither be written nor read at ZeRO 1",
        f"{_PARITY}::test_layout_changes_nothing",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._get_model_param_range_map",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer#model_param_group_index_map",
    ),
    _megatron(
        "Only a step copies main weights into the model's weights",
        "parallel.compat.megatron_private:publish_main_weights",
        "a restored bf16 run computes with its initial weights",
        "tests/parallel/compat/test_megatron_guards.py::test_main_weights_reach_the_model",
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params._copy_main_params_to_model_params",
    ),
    _megatron(
        "The expert bias is moved by a private function of Megatron-Core's own engine",
        "parallel.compat.megatron_private:update_expert_bias",
        "under DeepSpeed the expert bias never moves",
        "tests/pretrain/engine/test_deepspeed.py::test_kinds_of_model_on_composed_axes",
        "megatron.core.distributed.finalize_model_grads:_update_router_expert_bias",
        f"{_ROUTER}#local_tokens_per_expert",
    ),
    _megatron(
        "What routers count during a step is cleared by Megatron-Core's own engine only",
        "parallel.compat.megatron_private:clear_step_tensors",
        "under DeepSpeed the expert bias moves by the load of all steps so far",
        "tests/parallel/compat/test_megatron_guards.py::test_routers_count_each_step_alone",
        "megatron.core.distributed.finalize_model_grads:reset_model_temporary_tensors",
    ),
    _megatron(
        "Router losses are kept in a tracker whose own reduction averages in a collective, which gloo lacks",
        "parallel.compat.megatron_private:take_router_losses",
        "no router losses in the record, or sums over all steps so far",
        _LAYOUT_TEST,
        "megatron.core.transformer.moe.moe_utils:get_moe_layer_wise_logging_tracker",
        "megatron.core.transformer.moe.moe_utils:clear_aux_losses_tracker",
        last="0.17",
    ),
    _megatron(
        "Router losses are kept in a tracker object whose own reduction averages in a collective, which gloo lacks",
        "parallel.compat.megatron_private:take_router_losses",
        "no router losses in the record, or sums over all steps so far",
        _LAYOUT_TEST,
        "megatron.core.transformer.moe.moe_logging:get_moe_metrics_tracker",
        first="0.18",
    ),
    _megatron(
        "Losses of multi-token prediction are tracked as means of each rank's part of a micro-batch",
        "parallel.compat.prediction_losses:sum_prediction_losses",
        "mtp_loss depends on the layout, and is NaN where a part has no valid token",
        _PREDICTION_TEST,
        f"{_PREDICTION}:MTPLossLoggingHelper.tracker",
        f"{_PREDICTION}:roll_tensor",
    ),
    _megatron(
        "The model rolls the labels of multi-token prediction itself, and tells nobody the number of valid tokens",
        "parallel.compat.prediction_losses:sum_prediction_losses",
        "mtp_loss depends on the layout",
        _PREDICTION_TEST,
        "megatron.core.models.gpt.gpt_model:roll_tensor",
        last="0.16",
    ),
    _megatron(
        "Losses of multi-token prediction are given to a tracker that keeps means",
        "parallel.compat.prediction_losses:sum_prediction_losses",
        "mtp_loss depends on the layout",
        _PREDICTION_TEST,
        f"{_PREDICTION}:MTPLossLoggingHelper.save_loss_to_tracker",
        last="0.18",
    ),
    _megatron(
        "Losses and right guesses of multi-token prediction are given to a tracker that keeps means",
        "parallel.compat.prediction_losses:sum_prediction_losses",
        "mtp_loss depends on the layout",
        _PREDICTION_TEST,
        f"{_PREDICTION}:MTPLossLoggingHelper.save_metrics_to_tracker",
        first="0.19",
    ),
    _megatron(
        "The loss of a prediction depth is scaled by the rank's own counts of valid tokens",
        "parallel.compat.prediction_losses:sum_prediction_losses",
        "gradients depend on the context parallel degree: norm 3.6652 where 3.6630 is right, no error",
        _PREDICTION_TEST,
        "megatron.core.models.gpt.gpt_model:process_mtp_loss",
        first="0.17",
    ),
    _megatron(
        "Router losses are weighted by all tokens over valid tokens",
        "parallel.compat.megatron_guards:router_losses_of_all_tokens",
        "the more labels are masked, the stronger router losses act, no error",
        "tests/parallel/compat/test_megatron_guards.py::test_masked_labels_do_not_change_router_losses",
        "megatron.core.transformer.moe.moe_utils:MoEAuxLossAutoScaler.set_loss_scale",
    ),
    _megatron(
        "drop_policy=position keeps the tokens that top-k over equal numbers returns",
        "parallel.compat.expert_capacity:drop_tokens",
        "later tokens of a sequence keep their place in a full expert, earlier ones lose it",
        "tests/parallel/compat/test_expert_capacity.py::test_position_keeps_the_first_tokens",
        "megatron.core.transformer.moe.router:apply_router_token_dropping",
    ),
    _megatron(
        "The expert bias moves by the load after dropping and padding",
        "parallel.compat.expert_capacity:measure_before_dropping",
        "with pad_to_capacity the bias never moves",
        "tests/parallel/compat/test_expert_capacity.py::test_the_bias_moves_by_the_load_before_dropping",
        f"{_ROUTER}._apply_expert_bias",
    ),
    _megatron(
        "A router's map counts dropped tokens as not routed, and padding as routed",
        "parallel.compat.expert_capacity:routed_before_dropping",
        "load metrics show balanced experts, and dead ones as busy",
        "tests/parallel/compat/test_expert_capacity.py::test_loads_are_measured_before_dropping",
    ),
    _megatron(
        "A group of experts is scored by the sum of its best top_k / group_top_k",
        "parallel.compat.group_scores:score_groups_by",
        "DeepSeek-V2, which scores by the best one, answers with other experts: logits differ by up to 4.2, no error",
        "tests/tools/convert/test_odd_models.py::test_odd_models_come_back_the_same",
        "megatron.core.transformer.moe.moe_utils:group_limited_topk",
    ),
    _megatron(
        "A rehearsal must know how close routing decisions were",
        "parallel.compat.megatron_private:watch_routing",
        "a tie between two experts counts as a difference between layouts",
        "tests/parallel/compat/test_megatron_guards.py::test_routing_is_watched",
        f"{_ROUTER}.routing",
    ),
)
