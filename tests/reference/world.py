"""Runs of the package beside the independent trainer: whole attempts on forked ranks, read from their files.

A run's initial weights, its first gradient and its last weights come to the trainer's names through `convert export`.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from configs.load import to_yaml
from configs.schema import BlendPart, Config
from pretrain.run.files import iterate_lines
from tests.pretrain.data.conftest import write_pair
from tests.pretrain.world import exit_code, small_config
from tests.ranks import run_ranks
from tests.reference.data import read_pair
from tests.reference.model import Reference
from tests.reference.trainer import Judged, train
from tools.cli import run

STEPS = 4


def write_short_documents(folder: Path) -> None:
    """Token files whose documents have 4 to 24 tokens: every sample holds several ends of documents."""
    sequences, _ = read_pair(str(folder / "embedded"))
    tokens, random, end = np.concatenate(sequences), np.random.default_rng(0), eod_of(folder)
    cuts = np.cumsum(random.integers(3, 24, size=1500))
    documents = [[*part.tolist(), end] for part in np.split(tokens[: cuts[-1]], cuts[:-1])]
    write_pair(folder / "short", documents)


def eod_of(folder: Path) -> int:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tok.model")).piece_to_id("<|endoftext|>")


def qwen3_moe(config: Config) -> None:
    """Softmax scores of the chosen experts summing to 1, norms on queries and keys, a micro-batch's balancing loss."""
    config.model.moe.router.z_loss_coeff = 0.01


def deepseek_v3(config: Config) -> None:
    """Latent attention, sigmoid scores with a selection bias, groups, a shared expert, a prediction depth."""
    model = config.model
    model.attention.num_query_groups = model.attention.head_dim = None
    model.attention.qk_norm = False
    model.mla.kv_lora_rank, model.mla.q_lora_rank = 16, 20
    model.mla.qk_nope_head_dim, model.mla.qk_rope_head_dim, model.mla.v_head_dim = 12, 8, 10
    model.mla.norm_eps = 1e-6
    model.position.scaling.kind, model.position.scaling.factor = "yarn", 4.0
    model.position.scaling.original_max_position, model.position.scaling.mscale_all_dim = 16, 1.0
    model.moe.first_dense_layers, model.moe.shared_ffn_hidden_size = 1, 24
    router = model.moe.router
    model.moe.top_k = 4
    router.score, router.scaling_factor, router.num_groups, router.group_top_k = "sigmoid", 1.7, 4, 2
    router.expert_bias, router.expert_bias_update_rate, router.balance = True, 0.01, "seq_aux_loss"
    model.mtp.num_layers, model.mtp.loss_coeff = 1, 0.3
    # Labels without a loss: in every sample several.
    config.data.mask_eod_loss = True
    config.data.train = [BlendPart(config.data.train[0].path.replace("embedded", "short"))]


def mixtral(config: Config) -> None:
    """Documents apart, labels without a loss, a weighted blend, a linear schedule."""
    model = config.model
    model.attention.qk_norm = False
    model.moe.ffn_hidden_size = model.ffn_hidden_size
    config.data.document_mask = config.data.mask_eod_loss = True
    path = config.data.train[0].path
    config.data.train = [BlendPart(path.replace("embedded", "short"), 3.0), BlendPart(path, 1.0)]
    config.schedule.kind, config.schedule.min_lr = "linear", 1e-4


def gpt_oss(config: Config) -> None:
    """Sinks, alternating windows, biases everywhere, the load of the whole batch balanced."""
    model = config.model
    attention = model.attention
    attention.qk_norm, attention.qkv_bias, attention.output_bias, attention.sinks = False, True, True, True
    attention.window_size_tokens, attention.window_layers = 7, "alternate"
    model.activation, model.mlp_bias, model.moe.router.bias = "gpt_oss_glu", True, True
    model.position.scaling.kind, model.position.scaling.factor, model.position.scaling.truncate = "yarn", 4.0, False
    model.position.scaling.original_max_position = 16
    model.moe.router.balance = "global_aux_loss"


def with_muon(config: Config, **options: Any) -> None:
    config.optimizer.kind, config.optimizer.muon.ns_dtype = "muon", "fp32"
    for name, value in options.items():
        assert hasattr(config.optimizer.muon, name)
        setattr(config.optimizer.muon, name, value)


def deepseek_v3_muon(config: Config) -> None:
    """As Kimi K2 was trained: QK-clip under latent attention, whose heads are matrices."""
    deepseek_v3(config)
    with_muon(config, split_heads="head", qk_clip=0.3, qk_clip_alpha=0.7)


def gpt_oss_muon(config: Config) -> None:
    """Fused matrices as Megatron-Core stores them, a router of Muon's, biases of clipped queries."""
    gpt_oss(config)
    with_muon(config, split_heads="none", split_gate=False, router="muon", scale="spectral", lr_ratio=2.0, qk_clip=0.2)


def mixtral_muon(config: Config) -> None:
    """One key a head, clipped, without Nesterov's step; gradients are not clipped."""
    mixtral(config)
    config.model.attention.num_query_groups = None
    config.optimizer.clip_grad_norm = 0.0
    with_muon(config, nesterov=False, momentum=0.8, qk_clip=0.3, qk_clip_alpha=0.3)


def qwen3_moe_mup(config: Config) -> None:
    """muP's rates: the model is four times as wide as the one that was tuned."""
    qwen3_moe(config)
    config.model.mup.base_hidden_size = config.model.hidden_size // 4


OTHER_OPTIMIZERS: dict[str, Callable[[Config], None]] = {
    "deepseek_v3_muon": deepseek_v3_muon, "gpt_oss_muon": gpt_oss_muon, "mixtral_muon": mixtral_muon,
    "qwen3_moe_mup": qwen3_moe_mup,
}  # fmt: skip
MODELS: dict[str, Callable[[Config], None]] = {
    "qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3, "mixtral": mixtral, "gpt_oss": gpt_oss, **OTHER_OPTIMIZERS,
}  # fmt: skip

# name -> (ranks, overrides)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "tp2 pp2 ep2": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"]),
    "cp2 dp2": (4, ["parallel.context=2"]),
    "ZeRO-2": (2, ["zero.engine=deepspeed", "zero.stage=2"]),
    "ZeRO-3": (2, ["zero.engine=deepspeed", "zero.stage=3"]),
}


def data_parallel(layout: str) -> int:
    """Data parallel ranks of a layout above."""
    return {"one rank": 1, "tp2 pp2 ep2": 1, "cp2 dp2": 2, "ZeRO-2": 2, "ZeRO-3": 2}[layout]


def make_config(model: str, folder: Path, micro_batch_seqs: int) -> Config:
    """The config of one kind of model over the tests' corpus; `folder` holds its tokenizer and token files."""
    config = small_config(model__vocab_size=None)
    config.model.moe.router.aux_loss_coeff = 0.1
    config.data.tokenizer.path = str(folder / "tok.model")
    config.data.train = [BlendPart(str(folder / "embedded"))]
    config.batch.global_batch_seqs, config.batch.micro_batch_seqs, config.batch.seq_length_tokens = 8, micro_batch_seqs, 32
    config.run.steps, config.run.eval_batches, config.schedule.warmup_steps = STEPS, 1, 2
    config.optimizer.lr = 3e-3
    config.checkpoint.interval_steps, config.checkpoint.keep = 1, 0
    config.metrics.sinks = ["jsonl"]
    MODELS[model](config)
    return config


def attempt(config: Path, run_dir: Path, ranks: int, *overrides: str) -> None:
    words = ["--config", str(config), f"run.dir={run_dir}", f"launch.processes_per_node={ranks}", *overrides]
    assert run_ranks(ranks, _one_rank, words) == [0] * ranks


def _one_rank(words: list[str]) -> int:
    return exit_code(words)


@dataclass(frozen=True)
class Case:
    """One kind of model at one micro-batch: its config file, and its initial weights as a Hugging Face folder."""

    config: Path
    initial: Path
    eod: int
    num_depths: int

    def judge(self, ranks: int) -> Judged:
        """What the independent trainer makes of it, on so many data parallel ranks."""
        return train(self.config, self.initial, self.eod, ranks)


def make_case(model: str, folder: Path, micro_batch_seqs: int, place: Path) -> Case:
    """`place` is filled: a step with a vanishing rate leaves a checkpoint of the initial weights."""
    config = make_config(model, folder, micro_batch_seqs)
    path = place / "config.yaml"
    path.write_text(to_yaml(config))
    still = ["run.steps=1", "optimizer.lr=1e-30", "schedule.min_lr=0", "schedule.horizon_steps=9", "run.eval_batches=0"]
    still += ["model.moe.router.expert_bias_update_rate=0"]
    if config.optimizer.muon.qk_clip is not None:
        still += ["optimizer.muon.qk_clip=1e9"]
    attempt(path, place / "initial", 1, *still)
    export(place / "initial" / "checkpoints" / "step_0000001", place / "initial_hf")
    return Case(path, place / "initial_hf", eod_of(folder), config.model.mtp.num_layers)


def run_case(case: Case, layout: str, run_dir: Path) -> Judged:
    """The package's own run of a case, in the trainer's words."""
    ranks, overrides = LAYOUTS[layout]
    attempt(case.config, run_dir, ranks, *overrides)
    steps = run_dir / "checkpoints"
    rows = [row for _, row in iterate_lines(run_dir / "metrics.jsonl") if row is not None]
    gradients = _moments_as_weights(steps / "step_0000001", run_dir / "moments", rows[0]["grad_norm"])
    return Judged(rows, _read(gradients, run_dir / "gradient_hf", case), _read(steps / f"step_{STEPS:07d}", run_dir / "hf", case))


def _read(checkpoint: Path, out: Path, case: Case) -> dict[str, torch.Tensor]:
    export(checkpoint, out)
    return Reference(out, case.num_depths).tensors()


def export(checkpoint: Path, out: Path) -> None:
    assert run(["convert", "export", str(checkpoint), str(out)]) == 0


def _moments_as_weights(checkpoint: Path, out: Path, grad_norm: float) -> Path:
    """A copy whose weights are the gradients of step 1: the first moment is 0.1 of the clipped gradient, Muon's momentum 0.05."""
    shutil.copytree(checkpoint, out)
    manifest = json.loads((out / "manifest.json").read_text())
    optimizer = manifest["config"]["optimizer"]
    limit = optimizer["clip_grad_norm"]
    clipped = min(1.0, limit / (grad_norm + 1e-6)) if limit > 0 else 1.0
    shares = {"exp_avg": 1 - optimizer["beta1"], "momentum": 1 - optimizer["muon"]["momentum"]}
    index: dict[str, dict[str, int]] = {}
    for file in sorted(out.glob("*.safetensors")):
        held = load_file(file)
        kinds = {key: key.split(":", 1) for key in held}
        moments = {
            f"weight:{name}": held[key] / (shares[kind] * clipped) for key, (kind, name) in kinds.items() if kind in shares
        }
        buffers = {key: value for key, value in held.items() if key.startswith("weight:") and key not in moments}
        assert all("expert_bias" in key for key in buffers), "only buffers have no moments"
        save_file({**moments, **buffers}, file)
        manifest["files"][file.name] = file.stat().st_size
        index[file.name] = {key: zlib.crc32(value.numpy().tobytes()) for key, value in {**moments, **buffers}.items()}
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "index.json").write_text(json.dumps(index))
    return out


def differences(got: Judged, want: Judged) -> Iterator[tuple[str, float]]:
    """(what, relative difference) of every number and tensor that the trainer gives."""
    for step, row in enumerate(want.rows, start=1):
        for name, value in row.items():
            found: Any = got.rows[step - 1].get(name)
            assert found is not None, f"the record's row of step {step} has no {name}"
            yield f"{name} of step {step}", abs(found - value) / max(abs(value), 1e-6)
    for kind, ours, theirs in (("gradient", got.gradient, want.gradient), ("weight", got.weights, want.weights)):
        names = theirs.keys()
        assert names <= ours.keys(), f"no {kind} of {names - ours.keys()}"
        # A vanishing gradient is measured against the part of all of them.
        floor = 1e-4 * float(torch.stack([tensor.norm() for tensor in theirs.values()]).norm())
        for name in names:
            yield f"{kind} {name}", float((ours[name] - theirs[name]).norm() / max(float(theirs[name].norm()), floor))
