"""The names of special tokens inside a text: counted, told, and read as plain text when that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from pretrain.data.indexed import open_index
from pretrain.data.tokenizer import load_tokenizer, section_for
from tests.tools.data.test_cut_text import pattern, trained
from tools.cli import run

EOD = "<|endoftext|>"
TEXT = f"One {EOD} two{EOD}\n<|im_start|>three"


def write_tokenizer(path: Path, **eod: Any) -> str:
    """A tokenizer.json of words that knows two special tokens."""
    spec = json.loads(pattern(r"\p{N}| ?\p{L}+|\s+", added=("<|im_start|>",)).backend.to_str())  # pyright: ignore[reportArgumentType]
    next(token for token in spec["added_tokens"] if token["content"] == EOD).update(eod)
    path.write_text(json.dumps(spec))
    return str(path)


def tokenized(capfd: pytest.CaptureFixture[str], corpus: Path, tokenizer: str, out: Path, *options: str) -> tuple[dict, str]:
    arguments = ["data", "tokenize", "--corpus", str(corpus), "--tokenizer", tokenizer, "--out", str(out), "--json", *options]
    assert run(arguments) == 0
    shown = capfd.readouterr()
    return json.loads(shown.out), shown.err


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_tokenizer_json(special: bool, workers: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_tokenizer(tmp_path / "tok.json", special=special)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": "no special token"}))
    tokenizer = load_tokenizer(section_for(model))
    found, said = tokenized(capfd, tmp_path / "a.jsonl", model, tmp_path / "a", "--workers", workers)
    assert found["special_tokens_in_text"] == {EOD: 2, "<|im_start|>": 1}
    assert f"{EOD} 2 times, <|im_start|> 1 times" in said and "--special-tokens text" in said
    assert open_index(str(tmp_path / "a")).tokens().tolist().count(tokenizer.eod_id) == 4
    found, said = tokenized(
        capfd, tmp_path / "a.jsonl", model, tmp_path / "b", "--workers", workers, "--special-tokens", "text", "--no-append-eod"
    )
    assert found["special_tokens_in_text"] == {} and found["special_tokens"] == "text" and not said
    index = open_index(str(tmp_path / "b"))
    assert tokenizer.eod_id not in index.tokens()
    assert tokenizer.decode(index.document_tokens(0).tolist()) == TEXT


def test_without_appended_ends_all_ends_are_of_the_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    model = write_tokenizer(tmp_path / "tok.json")
    found, _ = tokenized(capfd, tmp_path / "a.txt", model, tmp_path / "a", "--workers", "1", "--no-append-eod")
    assert found["special_tokens_in_text"] == {EOD: 2, "<|im_start|>": 1}


def test_sentencepiece_reads_control_tokens_as_text(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    for options in ((), ("--special-tokens", "text")):
        found, said = tokenized(capfd, tmp_path / "a.txt", str(folder / "tok.model"), tmp_path / "a", "--workers", "1", *options)
        assert found["special_tokens_in_text"] == {} and not said


def test_a_token_that_is_always_matched_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    model = trained(model_type="bpe", eos_piece="</s>", user_defined_symbols=[EOD])
    (tmp_path / "t.model").write_bytes(model.proto)
    assert sentencepiece.SentencePieceProcessor(model_proto=model.proto).encode(EOD) == [model.eod_id]
    found, said = tokenized(capfd, tmp_path / "a.txt", str(tmp_path / "t.model"), tmp_path / "a", "--workers", "1")
    assert found["special_tokens_in_text"] == {EOD: 2} and "WARNING" in said
    arguments = ["data", "tokenize", "--corpus", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "t.model")]
    assert run([*arguments, "--out", str(tmp_path / "b"), "--special-tokens", "text"]) == 2
    assert "no way to read <|endoftext|> as plain text" in capfd.readouterr().err
    assert not list(tmp_path.glob("b.*"))
