"""A run's checkpoint goes to Hugging Face; an imported one starts a run; both generate text and are evaluated."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import ConfigError
from configs.load import to_yaml
from configs.schema import BlendPart, Config
from pretrain.run.evaluations import newest_scores, read_evaluations
from pretrain.run.folder import RunFolder
from tests.pretrain.world import exit_code, small_config
from tests.ranks import run_ranks
from tests.tools.convert.test_families import assert_same_bits, other_notes, run_export, run_import, tensors
from tests.tools.convert.tiny import MODELS, RARE, make
from tools.convert.hf_config.preset import interpret_config, preset_yaml, read_config
from tools.convert.verify import verify
from tools.inference.evaluate import evaluate
from tools.inference.generate import generate
from tools.inference.generate_exported import generate_exported

ROOT = Path(__file__).resolve().parents[3]


def one_rank(words: list[str]) -> int:
    return exit_code(words)


def run(config: Config, path: Path, *overrides: str, world: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(to_yaml(config))
    words = ["--config", str(path), f"run.dir={path.parent / 'run'}", f"launch.processes_per_node={world}", *overrides]
    assert run_ranks(world, one_rank, words) == [0] * world


def with_data(config: Config, folder: Path, steps: int) -> Config:
    config.data.tokenizer.path = str(folder / "tok.model")
    config.data.train = [BlendPart(str(folder / "embedded"))]
    config.batch.global_batch_seqs, config.batch.seq_length_tokens = 8, 32
    config.run.steps, config.run.eval_batches, config.metrics.sinks = steps, 1, ["jsonl"]
    return config


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: 3 steps on 4 ranks, two stages, two expert ranks."""
    place = tmp_path_factory.mktemp("trained") / "work"
    config = with_data(small_config(model__vocab_size=None, schedule__horizon_steps=3), folder, 3)
    run(config, place / "config.yaml", "parallel.pipeline=2", "parallel.expert=2", world=4)
    return place / "run"


def test_a_run_is_exported_and_generates_in_transformers(trained: Path, tmp_path: Path) -> None:
    done = run_export(trained, tmp_path / "hf")
    assert done["family"] == "qwen3_moe" and not other_notes(done)
    assert verify(trained, tmp_path / "hf", None, 2, 32, 1e-4)["ok"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    ids = tokenizer("def main(argv", return_tensors="pt")
    theirs = model.generate(**ids, max_new_tokens=12, do_sample=False)
    ours = generate(trained, ["def main(argv"], 12, 0.0, None, 0, None)["texts"][0]
    # Ids, since an untrained model writes bytes that are no UTF-8, which every decoder mends in its own way.
    assert theirs[0, ids["input_ids"].shape[1] :].tolist() == ours["token_ids"]
    exported = generate_exported(tmp_path / "hf", ["def main(argv", ""], 12, 0.0, None, 0)["texts"]
    assert exported[0]["token_ids"] == ours["token_ids"] and exported[1]["token_ids"]
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="transformers loads"):
        generate_exported(tmp_path / "hf", [""], 1, 0.0, None, 0)


def test_dtypes_of_an_export(trained: Path, tmp_path: Path) -> None:
    run_export(trained, tmp_path / "hf", dtype="bf16")
    run_export(trained, tmp_path / "exact")
    exact = tensors(tmp_path / "exact")
    for name, tensor in tensors(tmp_path / "hf").items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact[name].to(torch.bfloat16)), name
    assert read_config(tmp_path / "hf")["torch_dtype"] == "bfloat16"


def test_evaluate_counts_what_is_held_out(trained: Path, folder: Path) -> None:
    held = evaluate(trained, None, 2000, None, 4)
    assert 0 < held["loss"] < math.log(700) + 1 and held["perplexity"] == pytest.approx(math.exp(held["loss"]))
    assert held["tokens"] % 32 == 0 and held["tokens"] <= 2000
    one, four = (evaluate(trained, [str(folder / "embedded")], 640, 64, batch) for batch in (1, 4))
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-6)


TASK = """
task: next_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    ("def main(", ["argv)", "zebra"]),
    ("import", ["os", "the sea"]),
    ("class", ["Test", "of 1812"]),
    ("for i in", ["a", "b"]),
]


def test_tasks_of_the_harness_are_scored_and_kept_with_the_run(trained: Path, tmp_path: Path) -> None:
    """By the command, offline, with a task of our own. The score is what transformers' logits say."""
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "next_word.yaml").write_text(TASK.format(questions=tmp_path / "questions.jsonl"))
    done = run_evaluate(trained, "--tasks", "next_word", "--include-path", str(tmp_path), "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    run_export(trained, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)

    def log_probability(question: str, choice: str) -> float:
        before, whole = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (question, f"{question} {choice}"))
        with torch.no_grad():
            chosen = model(whole).logits.log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])
        return float(chosen[before.shape[1] - 1 :].sum())

    right = [log_probability(question, choices[0]) > log_probability(question, choices[1]) for question, choices in QUESTIONS]
    assert found["scores"] == {"next_word/acc": sum(right) / len(right)} and found["documents"] == {"next_word": len(right)}
    (kept,) = read_evaluations(RunFolder(trained))
    assert kept["scores"] == found["scores"] == newest_scores(RunFolder(trained)) and kept["step"] == 3


@pytest.mark.prove
def test_unknown_tasks_are_one_report(trained: Path) -> None:
    refused = run_evaluate(trained, "--tasks", "no_such_task,nor_this", code=2)
    assert refused.stderr.count("must be a task of lm-evaluation-harness") == 2


def run_evaluate(run_dir: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the harness starts threads, which the forks of later ranks would not survive."""
    command = [sys.executable, "-m", "tools.cli", "evaluate", str(run_dir), *words]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_generate_is_repeatable_and_draws(trained: Path) -> None:
    first, again = (generate(trained, ["import", ""], 8, 1.0, 20, 5, None)["texts"] for _ in range(2))
    assert first == again
    assert generate(trained, ["import"], 8, 1.0, 20, 6, None)["texts"][0]["text"] != first[0]["text"]


YARN = "{kind: yarn, factor: 4, original_max_position: 32}"
LLAMA3 = "{kind: llama3, factor: 8, original_max_position: 8192}"


@pytest.mark.parametrize(
    ("scaling", "theirs"), [(YARN, {"rope_type": "yarn", "factor": 4.0}), (LLAMA3, {"rope_type": "llama3", "factor": 8.0})]
)
def test_a_context_grows_from_phase_to_phase(
    scaling: str, theirs: dict[str, Any], trained: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = with_data(small_config(model__vocab_size=None, schedule__horizon_steps=3), folder, 1)
    grown = [f"checkpoint.load={trained}", f"model.position.scaling={scaling}", "batch.seq_length_tokens=128"]
    path = tmp_path / "work" / "config.yaml"
    path.parent.mkdir()
    path.write_text(to_yaml(config))
    refused = ["--config", str(path), f"run.dir={tmp_path / 'no'}", "launch.processes_per_node=1", *grown]
    assert run_ranks(1, one_rank, refused) == [2]
    assert "checkpoint.allow_change=[model.position.scaling.kind]" in capfd.readouterr().err
    run(config, path, *grown, "checkpoint.allow_change=[model.position.scaling]", world=1)
    run_export(tmp_path / "work" / "run", tmp_path / "out")
    assert theirs.items() <= read_config(tmp_path / "out")["rope_parameters"].items()
    assert verify(tmp_path / "work" / "run", tmp_path / "out", None, 2, 128, 1e-4)["ok"]


NEW = [*RARE, "llama4", "minimax_m2", "qwen3_next", "qwen3_5_moe"]


@pytest.mark.parametrize(
    ("name", "world", "words"),
    [
        pytest.param("qwen3_moe", 2, ["parallel.expert=2"], marks=pytest.mark.prove),
        pytest.param("qwen3_moe", 4, ["parallel.tensor=2", "parallel.pipeline=2"]),
        *(pytest.param(name, 2, ["parallel.tensor=2"], marks=pytest.mark.prove) for name in NEW),
    ],
)
def test_an_import_is_trained_on_and_goes_back(name: str, world: int, words: list[str], folder: Path, tmp_path: Path) -> None:
    config = with_data(Config(), folder, 1)
    # In a process of its own, since transformers starts threads, which the ranks' fork would not survive.
    script = "import sys; from pathlib import Path; from tests.tools.convert.tiny import make; "
    more = "num_hidden_layers=2, mlp_only_layers=[], num_attention_heads=4" if name == "qwen3_moe" else ""
    script += f"make({name!r}, Path({str(tmp_path / 'hf')!r}), vocab_size=704, {more})"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, timeout=200)
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    config.model = interpret_config(read_config(tmp_path / "hf"))[1]
    config.precision.params = "fp32"
    config.schedule.horizon_steps, config.optimizer.lr = 2, 1e-3
    run(config, tmp_path / "work" / "config.yaml", f"checkpoint.load={tmp_path / 'checkpoint'}", *words, world=world)
    run_export(tmp_path / "work" / "run", tmp_path / "out", family_name=name)
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        moved = (before[name] - after[name]).abs().max()
        assert 0 < moved < 0.01 or "norm" in name, (name, moved)
    assert verify(tmp_path / "work" / "run", tmp_path / "out", None, 2, 32, 1e-4)["ok"]


def test_a_preset_made_from_config_json_is_the_checkpoints_model(tmp_path: Path) -> None:
    make("deepseek_v3", tmp_path / "hf")
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    model = interpret_config(read_config(tmp_path / "hf"))[1]
    model.name, model.source = "hf", "imported from a Hugging Face folder of type deepseek_v3"
    text = (tmp_path / "checkpoint" / "model.yaml").read_text()
    assert text.split("\n", 1)[1] == preset_yaml(model)


def test_what_no_family_can_say_is_refused(tmp_path: Path) -> None:
    make("qwen3_moe", tmp_path / "hf")
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    manifest: dict[str, Any] = json.loads((tmp_path / "checkpoint" / "manifest.json").read_text())
    manifest["config"]["model"]["moe"]["router"]["score"] = "sigmoid"
    (tmp_path / "checkpoint" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="softmax"):
        run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_adapter_trains_on_an_export(tmp_path: Path) -> None:
    import peft  # noqa: PLC0415  (seconds)

    make("qwen3_moe", tmp_path / "hf")
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_bits(tmp_path / "hf", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    ids = torch.arange(16)[None] % MODELS["qwen3_moe"][1]["vocab_size"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
