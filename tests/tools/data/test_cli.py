"""The commands as a script sees them: exit codes, JSON on stdout, the rest on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError
from tools.data import inspect
from tools.data.cli import main


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_from_nothing_to_training_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, prefix = str(tmp_path / "tok.model"), str(tmp_path / "train")
    trained = run_json(capsys, "tokenizer", "--corpus", "embedded", "--vocab-size", "600", "--max-mb", "0.2", "--out", model)
    assert (trained["vocab_size"], trained["eod_id"]) == (600, 1)
    assert Path(trained["tokenizer_json"]).name == "tokenizer.json"
    made = run_json(
        capsys, "tokenize", "--corpus", "embedded", "--max-mb", "0.2", "--tokenizer", model, "--out", prefix, "--workers", "1"
    )
    found = run_json(capsys, "inspect", prefix, "--tokenizer", model, "--documents", "1")
    for key in ("num_tokens", "num_documents", "dtype", "max_token_id"):
        assert found[key] == made[key]
    assert found["unigram_entropy_nats"] == pytest.approx(made["unigram_entropy_nats"])
    assert sum(row["documents"] for row in found["length_histogram"]) == found["num_documents"]
    assert found["documents"][0]["text"] and found["ok"] is True
    looked = run_json(capsys, "inspect", model)
    assert looked["round_trip"] is True and looked["sha256"] == trained["sha256"]


def test_text_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "embedded"), "--tokenizer", str(folder / "tok.model")]) == 0
    shown = capsys.readouterr().out
    assert "unigram_entropy_nats" in shown and "documents by length in tokens:" in shown and "document 2," in shown


def test_no_eod(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("hello")
    arguments = ["--corpus", str(tmp_path / "a.txt"), "--tokenizer", str(folder / "tok.model"), "--workers", "1"]
    with_eod = run_json(capsys, "tokenize", *arguments, "--out", str(tmp_path / "a"))
    without = run_json(capsys, "tokenize", *arguments, "--no-append-eod", "--out", str(tmp_path / "b"))
    assert with_eod["num_tokens"] == without["num_tokens"] + 1


def test_bad_corpus_and_bad_tokenizer_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        main(["tokenize", "--corpus", "absent.txt", "--tokenizer", "absent.model", "--out", str(tmp_path / "a")])
    assert len(caught.value.problems) == 2


def test_inspect_names_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must both exist"):
        main(["inspect", str(tmp_path / "absent")])
    (tmp_path / "broken.model").write_bytes(b"x")
    with pytest.raises(ConfigError, match="a sentencepiece"):
        main(["inspect", str(tmp_path / "broken.model")])


def test_counts_in_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inspect.inspect_data(str(folder / "embedded"), None, 0)
    monkeypatch.setattr(inspect, "BLOCK_TOKENS", 1000)
    assert inspect.inspect_data(str(folder / "embedded"), None, 0) == whole


@pytest.mark.parametrize("arguments", [["tokenizer"], ["tokenize", "--workers", "0"], ["nothing"], []])
def test_bad_arguments_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom tools.data.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'sentencepiece', 'rich')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[3], stdout=subprocess.DEVNULL)
