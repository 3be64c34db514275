"""Exact totals of published models, and FLOPs against counts by hand and against the models' products built by torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from configs.load import load_config
from configs.model_schema import (
    Attention,
    LatentAttention,
    Model,
    MoE,
    MultiToken,
    Position,
    Router,
    SparseAttention,
)
from parallel.architecture import indexer_products, moe_layers
from parallel.flops import count_parameters, gathers_keys, index_pair_flops, mean_context, training_flops


def model(layers: int, hidden: int, heads: int, groups: int, head_dim: int | None, **values) -> Model:
    attention = Attention(num_heads=heads, num_query_groups=groups, head_dim=head_dim, **values.pop("attention", {}))
    return Model(num_layers=layers, hidden_size=hidden, attention=attention, **values)


def latent(layers: int, hidden: int, heads: int, q_rank: int | None, dense_ffn: int, moe: MoE, mtp: int = 0) -> Model:
    mla = LatentAttention(kv_lora_rank=512, q_lora_rank=q_rank)
    attention = Attention(num_heads=heads)
    return Model(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=dense_ffn, attention=attention, mla=mla, moe=moe,
        mtp=MultiToken(num_layers=mtp),
    )  # fmt: skip


def oss(layers: int, experts: int) -> Model:
    moe = MoE(num_experts=experts, top_k=4, ffn_hidden_size=2880, router=Router(bias=True))
    biases = {"qkv_bias": True, "output_bias": True, "sinks": True}
    return model(layers, 2880, 64, 8, 64, moe=moe, mlp_bias=True, activation="gpt_oss_glu", attention=biases)


def glm() -> Model:
    moe = MoE(num_experts=160, top_k=8, ffn_hidden_size=1536, first_dense_layers=3, shared_ffn_hidden_size=1536)
    attention = {"qk_norm": True, "qkv_bias": True}
    return model(92, 5120, 96, 8, 128, ffn_hidden_size=12288, moe=moe, attention=attention, mtp=MultiToken(num_layers=1))


def deepseek_v3(layers: int = 61, heads: int = 128, experts: int = 256, dense: int = 3, mtp: int = 1) -> Model:
    moe = MoE(num_experts=experts, top_k=8, ffn_hidden_size=2048, first_dense_layers=dense, shared_ffn_hidden_size=2048)
    return latent(layers, 7168, heads, 1536, 18432, moe, mtp)


V2 = MoE(num_experts=160, top_k=6, ffn_hidden_size=1536, first_dense_layers=1, shared_ffn_hidden_size=3072)
V2_LITE = MoE(num_experts=64, top_k=6, ffn_hidden_size=1408, first_dense_layers=1, shared_ffn_hidden_size=2816)
MIXTRAL = MoE(num_experts=8, top_k=2, ffn_hidden_size=14336)
QWEN = {"qk_norm": True}

# name: model, vocabulary, total, active (all; without input embedding; non-embedding)
GOLDEN = {
    "Mixtral-8x7B": (
        model(32, 4096, 32, 8, None, moe=MIXTRAL), 32000, 46_702_792_704, (12_879_925_248, 12_748_853_248, 12_617_781_248),
    ),
    "Mixtral-8x22B": (
        model(56, 6144, 48, 8, None, moe=MoE(num_experts=8, top_k=2, ffn_hidden_size=16384)), 32000, 140_620_634_112, None,
    ),
    "Qwen3-30B-A3B": (
        model(48, 2048, 32, 4, 128, moe=MoE(num_experts=128, top_k=8, ffn_hidden_size=768), attention=QWEN),
        151936, 30_532_122_624, (3_353_032_704, 3_041_867_776, 2_730_702_848),
    ),
    "Qwen3-235B-A22B": (
        model(94, 4096, 64, 4, 128, moe=MoE(num_experts=128, top_k=8, ffn_hidden_size=1536), attention=QWEN),
        151936, 235_093_634_560, (22_190_763_520, 21_568_433_664, 20_946_103_808),
    ),
    "DeepSeek-V3": (deepseek_v3(), 129280, 671_026_404_352, (37_552_282_624, 36_625_603_584, 35_698_924_544)),
    "Kimi-K2": (deepseek_v3(heads=64, experts=384, dense=1, mtp=0), 163840, 1_026_408_209_408, None),
    "DeepSeek-V2": (
        latent(60, 5120, 128, 1536, 12288, V2), 102400, 235_741_434_880, (21_375_800_320, 20_851_512_320, 20_327_224_320),
    ),
    "DeepSeek-V2-Lite": (
        latent(27, 2048, 16, None, 10944, V2_LITE), 102400, 15_706_484_224, (2_661_150_208, 2_451_435_008, 2_241_719_808),
    ),
    "GLM-4.5": (glm(), 151552, 352_797_814_784, (33_632_251_904, 32_856_305_664, 32_080_359_424)),
    "gpt-oss-120b": (oss(36, 128), 201088, 116_829_156_672, (5_711_982_912, 5_132_849_472, 4_553_716_032)),
    "gpt-oss-20b": (oss(24, 32), 201088, 20_914_757_184, (4_187_440_704, 3_608_307_264, 3_029_173_824)),
    "Qwen3-4B": (
        model(36, 2560, 32, 8, 128, ffn_hidden_size=9728, tie_embeddings=True, attention=QWEN),
        151936, 4_022_468_096, (4_022_468_096, 4_022_468_096, 3_633_511_936),
    ),
    "Llama-3.1-405B": (
        model(126, 16384, 128, 8, None, ffn_hidden_size=53248), 128256, 405_853_388_800,
        (405_853_388_800, 403_752_042_496, 401_650_696_192),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_parameters(name: str) -> None:
    architecture, vocab, total, active = GOLDEN[name]
    parameters = count_parameters(architecture, vocab)
    assert parameters.total == total
    if active:
        assert tuple(parameters.active.values()) == active


def test_olmoe_differs_by_its_full_width_norms_only() -> None:
    olmoe = model(16, 2048, 16, 16, None, moe=MoE(num_experts=64, top_k=8, ffn_hidden_size=1024), attention=QWEN)
    # Its q and k norms span all heads (2048 each), ours one head (128 each).
    assert count_parameters(olmoe, 50304).total + 16 * 2 * (2048 - 128) == 6_919_161_856


@pytest.mark.parametrize(("name", "layer"), [("DeepSeek-V3", 11_610_067_968), ("GLM-4.5", 3_988_069_632)])
def test_golden_prediction_depths_are_counted_apart(name: str, layer: int) -> None:
    architecture, vocab, *_ = GOLDEN[name]
    # The published layer 61 (or 92) carries a final norm of its own for the shared head, as ours does.
    assert count_parameters(architecture, vocab).mtp == layer


def test_components_add_up() -> None:
    parameters = count_parameters(glm(), 151552)
    document = parameters.as_dict()
    components = document["params_by_component"]
    assert isinstance(components, dict)
    assert sum(components.values()) == parameters.total + parameters.mtp


def test_patterns_of_layers() -> None:
    pattern = Model(num_layers=6, moe=MoE(num_experts=4, first_dense_layers=1, layer_frequency=2))
    assert moe_layers(pattern) == (False, False, True, False, True, False)
    explicit = Model(num_layers=3, moe=MoE(num_experts=4, layer_pattern=[0, 1, 0]))
    assert moe_layers(explicit) == (False, True, False)
    assert moe_layers(Model(num_layers=2)) == (False, False)


def test_flops_by_hand() -> None:
    # h 64, 4 heads of 16, 2 key/value heads, 4 experts of width 32, top-2, shared expert 48 with a gate, vocabulary 100.
    moe = MoE(num_experts=4, top_k=2, ffn_hidden_size=32, first_dense_layers=1, shared_ffn_hidden_size=48, shared_gate=True)
    tiny = model(2, 64, 4, 2, 16, ffn_hidden_size=96, moe=moe, mtp=MultiToken(num_layers=1))
    flops = training_flops(tiny, 100, 32)
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    moe_layer = 2 * 3 * 64 * 32 + 3 * 64 * 48 + 64 + 64 * 4
    scores = 3 * 2 * 4 * (16 + 16) * 16
    assert flops.attention_weights == 6 * 2 * attention
    assert flops.attention_scores == 2 * scores
    assert flops.dense == 6 * 3 * 64 * 96
    assert flops.routed + flops.shared + flops.router == 6 * moe_layer
    assert flops.head == 6 * 64 * 100
    assert flops.mtp == 6 * (attention + moe_layer + 2 * 64 * 64) + scores + 6 * 64 * 100


def test_six_times_the_active_weights_and_attention() -> None:
    """The usual rule, 6N + 6·layers·heads·head_dim·s (causal), is exact but for norms, biases and embeddings."""
    llama, vocab, *_ = GOLDEN["Llama-3.1-405B"]
    flops, parameters = training_flops(llama, vocab, 8192), count_parameters(llama, vocab)
    weights = parameters.active["without_input_embedding"] - parameters.norms
    assert flops.per_token == 6 * weights + 6 * 126 * 128 * 128 * 8192


def test_grouped_queries_save_weights_but_no_scores() -> None:
    full, grouped = (model(4, 64, 8, groups, 8) for groups in (8, 1))
    a, b = training_flops(full, 100, 64), training_flops(grouped, 100, 64)
    assert a.attention_scores == b.attention_scores
    assert a.attention_weights - b.attention_weights == 6 * 4 * 2 * 64 * 7 * 8


def test_windows() -> None:
    assert mean_context(100, None) == 50 == mean_context(100, 100) == mean_context(100, 400)
    exact = sum(min(position, 10) for position in range(1, 101)) / 100
    assert mean_context(100, 10) == pytest.approx(exact, abs=0.5)
    for length in (20, 25):
        in_chunks = sum(position % 10 + 1 for position in range(length)) / length
        assert mean_context(length, 10, chunked=True) == pytest.approx(in_chunks, abs=0.5)
    assert mean_context(8, 10, chunked=True) == mean_context(8, None)
    every, alternate = (
        model(4, 64, 8, 8, 8, attention={"window_size_tokens": 16, "window_layers": layers}) for layers in ("all", "alternate")
    )
    plain = model(4, 64, 8, 8, 8)
    scores = [training_flops(each, 100, 128).attention_scores for each in (plain, every, alternate)]
    assert scores[2] == (scores[0] + scores[1]) / 2


def test_latent_attention_scores_use_its_own_widths() -> None:
    v3 = deepseek_v3(mtp=0)
    assert training_flops(v3, 129280, 4096).attention_scores == 3 * 61 * 2 * 128 * (192 + 128) * 2048


SPARSE = SparseAttention(top_k=16, num_index_heads=3, index_head_dim=20)


def sparse() -> Model:
    """Widths that all differ."""
    mla = LatentAttention(kv_lora_rank=24, q_lora_rank=28, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)
    return Model(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, attention=Attention(num_heads=4), mla=mla, dsa=SPARSE,
        mtp=MultiToken(num_layers=1),
    )  # fmt: skip


def test_an_indexer_multiplies_as_transformers_does() -> None:
    """Its forward pass counted by torch, which scores all pairs, those that no query may see too."""
    tiny, tokens = sparse(), 40
    config = DeepseekV32Config(
        hidden_size=64, q_lora_rank=28, qk_rope_head_dim=8, index_topk=16, index_n_heads=3, index_head_dim=20, num_hidden_layers=1
    )
    indexer = DeepseekV32Indexer(config, 0)
    hidden, rank = torch.randn(1, tokens, 64), torch.randn(1, tokens, 28)
    turned = torch.randn(1, tokens, 8)
    with FlopCounterMode(display=False) as counted:
        chosen = indexer(hidden, rank, (turned, turned), torch.zeros(1, tokens, tokens), torch.arange(tokens)[None])
    assert chosen.shape == (1, tokens, 16)
    assert counted.get_total_flops() == tokens * (2 * indexer_products(tiny) + tokens * index_pair_flops(tiny))
    assert sum(weight.numel() for weight in indexer.parameters()) == indexer_products(tiny) + 2 * 20


def test_sparse_attention_by_hand() -> None:
    tiny, tokens = sparse(), 64
    chosen = 16 - 16**2 / 128
    flops = training_flops(tiny, 100, tokens)
    indexer = 4 * (28 * 60 + 64 * 20 + 64 * 3) + 2 * 3 * 21 * (32 + 2 * chosen)
    scores = 3 * 2 * 4 * (20 + 10) * chosen
    assert flops.indexer == 2 * indexer and flops.attention_scores == 2 * scores
    dense = replace(tiny, dsa=SparseAttention())
    weights = training_flops(dense, 100, tokens)
    assert weights.indexer == 0 and weights.attention_weights == flops.attention_weights
    assert flops.mtp - weights.mtp == pytest.approx(indexer + scores - 3 * 2 * 4 * (20 + 10) * 32)
    assert count_parameters(tiny, 100).indexer == 2 * (28 * 60 + 64 * 20 + 64 * 3)


def test_keys_are_gathered_on_long_sequences_only() -> None:
    """The multi-query form of DeepSeek-V3.2 is 1088 wide for each pair of a query and a key, plain heads are 320 wide."""
    v32 = load_config("model/deepseek_v3_2").config.model
    assert not gathers_keys(v32, 4096) and not gathers_keys(v32, 12288) and gathers_keys(v32, 16384)
    assert not gathers_keys(replace(v32, dsa=SparseAttention()), 131072)


def test_learned_positions_are_embeddings() -> None:
    learned = model(2, 64, 4, 4, None, position=Position(kind="learned"), max_position_tokens=50)
    assert count_parameters(learned, 10).embedding == 60 * 64
