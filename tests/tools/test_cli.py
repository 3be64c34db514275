"""The command line: what it prints, its exit codes, the JSON that scripts read."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_config
from configs.sources import shipped_names
from tools import cli
from tools.bench.cli import BENCHES

ROOT = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = cli.run(words)
    except SystemExit as left:  # argparse
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--help")
    assert code == 0 and not err
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert out.count("  phalanx ") == 2 and "Exit codes" in out
    assert run(capsys)[1] == out


def test_every_listed_command_exists() -> None:
    missing = [name for name, command in cli.COMMANDS.items() if importlib.util.find_spec(command.module) is None]
    assert not missing


def test_measurements_are_listed_and_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(f"  {name} " in run(capsys, "bench")[1] for name in BENCHES)
    assert not [name for name, bench in BENCHES.items() if importlib.util.find_spec(bench.module) is None]
    code, out, err = run(capsys, "bench", "nosuch")
    assert code == 2 and not out and "step, checkpoint" in err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and f"phalanx {name}" in out


def test_the_examples_of_the_help_are_legal(capsys: pytest.CaptureFixture[str]) -> None:
    examples = [
        line.split()[2:] for line in cli.help_text().splitlines() if line.startswith(("  phalanx check", "  phalanx launch"))
    ]
    assert len(examples) == 2
    for words in examples:
        assert run(capsys, "check", *words, "--no-data", "--json")[0] == 0, words


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "chekc")
    assert code == 2 and not out and "did you mean check?" in err
    assert "commands are data, check" in run(capsys, "xyzzy")[2]


def test_bad_words_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check")[0] == 2
    assert run(capsys, "check", "quickstart", "--nonsense")[0] == 2


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without the quickstart's data."""
    monkeypatch.chdir(tmp_path)


NO_DATA = ("--no-data", "model.vocab_size=2048")


@pytest.mark.parametrize("name", [name for name in shipped_names() if "/" not in name])
def test_shipped_runs_are_legal_and_fit_their_gpus(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [] if load_config(name).config.model.vocab_size else ["model.vocab_size=2048"]
    code, out, err = run(capsys, "check", name, *words, "--no-data", "--json")
    assert code == 0 and json.loads(out)["ok"] and not err
    code, out, err = run(capsys, "plan", name, *words, "--json")
    assert code == 0 and json.loads(out)["fits"] and not err


def test_a_legal_config(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", "cluster/laptop", "run.steps=3", *NO_DATA)
    assert (code, err) == (0, "")
    assert "layout   one rank" in out and "parameters" in out and "run      3 steps, 3,072 tokens" in out


def test_the_verdict_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", "quickstart", "--json", *NO_DATA)
    verdict = json.loads(out)
    assert set(verdict) == {"ok", "problems", "warnings", "layout", "data", "resume", "optimizer"} and not err
    assert verdict["layout"] == {
        "tensor": 1, "sequence": False, "pipeline": 2, "virtual_pipeline": 1, "context": 1, "expert": 2, "expert_tensor": 1,
        "nodes": 1, "processes_per_node": 4, "world_size": 4, "data": 2, "expert_data": 1, "num_micro_batches": 4,
    }  # fmt: skip
    assert all(set(warning) == {"path", "text"} for warning in verdict["warnings"])
    assert code == 0 and verdict["ok"] and verdict["problems"] == []


def test_missing_data_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "quickstart", "--json", "zero.stage=2")
    paths = [problem["path"] for problem in json.loads(out)["problems"]]
    assert code == 2 and "zero.stage" in paths and "data.tokenizer.path" in paths and "data.train[0].path" in paths


def test_bad_lengths_keep_the_data_unread(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "quickstart", "--json", "batch.seq_length_tokens=0", "data.train=[{path: x, weight: 0}]")
    assert code == 2 and {"batch.seq_length_tokens", "data.train[0].weight"} == {p["path"] for p in json.loads(out)["problems"]}


def test_a_bad_config_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "check", "quickstart", "--json", "zero.stage=3", "optimizer.lr=.nan", "batch.global_batch_seqs=30", "--no-data"
    )
    verdict = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 2 and not err and not verdict["ok"]
    found = {problem["path"]: problem for problem in verdict["problems"]}
    assert {"zero.stage", "optimizer.lr", "batch.global_batch_seqs"} <= set(found)
    assert all(set(problem) == {"path", "got", "rule", "fix"} for problem in found.values())
    assert found["optimizer.lr"]["got"] == "nan"
    assert verdict["layout"]["num_micro_batches"] is None


@pytest.mark.parametrize("words", [("nowhere",), ("quickstart", "paralel.tensor=2"), ("quickstart", "optimizer.lr=[1")])
def test_what_cant_be_read_is_in_the_json_too(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", *words, "--json", "--no-data")
    verdict = json.loads(out)
    assert code == 2 and not err and verdict["layout"] is None and len(verdict["problems"]) == 1


def test_a_misspelled_key_hides_no_other_problem(capsys: pytest.CaptureFixture[str]) -> None:
    """Rules that read the key that was meant are skipped: 30 sequences are no multiple of 8 ranks only with tensor = 1."""
    words = ("parallel.tensr=2", "zero.stage=two", "optimizer.lr=-1", "model.attention.num_heads=3", "batch.global_batch_seqs=30")
    for command in (("check", "quickstart", *words, "data.train.0.path=nowhere"), ("launch", "quickstart", *words, "--dry-run")):
        code, out, err = run(capsys, *command)
        paths = [line.split(" = ")[0].strip() for line in err.splitlines() if " = " in line and "rule:" not in line]
        wanted = ["parallel.tensr", "zero.stage", "optimizer.lr", "model.attention.num_query_groups"]
        files = [path for path in paths if path.startswith("data.")]
        assert code == 2 and not out and paths == wanted + files and bool(files) == (command[0] == "check")


def test_a_word_that_may_be_any_key_leaves_the_rules_between_keys_out(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "check", "quickstart", "batch.global_batch_seqs=30", "run.seed=-1", "parallel.tensor", "2")
    assert code == 2 and "run.seed = -1" in err and "global_batch_seqs" not in err


def test_a_path_longer_than_names_of_files_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("convert", "inspect"), ("data", "inspect"), ("status",), ("model",), ("generate",)):
        code, _, err = run(capsys, *words, "x" * 300)
        assert code == 2 and "xxx" in err, words


def test_no_layout_where_the_degrees_make_none(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("parallel.tensor=3", "parallel.tensor=0", "launch.nodes=0"):
        code, out, _ = run(capsys, "check", "quickstart", words, "--json")
        assert code == 2 and json.loads(out)["layout"] is None


def test_the_report_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "check", "quickstart", "model.moe.top_k=9")
    assert code == 2 and "Traceback" not in err
    assert (
        "model.moe.top_k = 9\n      rule: must be at most model.moe.num_experts = 8\n      fix:  set model.moe.top_k=8 or less"
        in err
    )


def test_strict_takes_warnings_for_problems(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("check", "quickstart", "schedule.decay_steps=3", *NO_DATA)
    _, out, _ = run(capsys, *words, "--json", "--strict")
    assert json.loads(out)["warnings"]
    assert run(capsys, *words, "--strict")[0] == 2


def test_stages_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = run(capsys, "check", "quickstart", "parallel.virtual_pipeline=2", *NO_DATA)
    assert "stage 0  embedding + layers 0; layers 2" in text and "stage 1  layers 1; layers 3 + head" in text


def program(*words: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    line = shlex.join([sys.executable, "-m", "tools.cli", *words])
    return subprocess.run(["sh", "-c", shell + line], cwd=ROOT, capture_output=True, text=True, check=False)


def test_as_a_program() -> None:
    assert program("--help").returncode == 0
    bad = program("check", "nowhere")
    assert bad.returncode == 2 and "Traceback" not in bad.stderr and "shipped" in bad.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    assert program("nope", shell="exec 1>&-; ").returncode == 2
    left = subprocess.run(
        ["sh", "-c", f"({shlex.join([sys.executable, '-m', 'tools.cli', '--help'])}; echo code $? >&2) | true"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in left.stderr and "BrokenPipe" not in left.stderr
