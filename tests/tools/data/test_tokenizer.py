"""Tokenizers: round trips, the same ids in both formats, and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from configs.errors import ConfigError
from configs.schema import TokenizerConfig as Section
from pretrain.data.tokenizer import TextTokenizer, load_tokenizer, section_for
from tools.data.read.embedded_corpus import documents
from tools.data.read.find_files import expand
from tools.data.train_tokenizer import train

HARD = [
    "def f(x):\n\tif  x == 12345:\r\n\t    return 'é'   \n\n\n",
    "日本語 한국어 🎉👩‍👩‍👧 naïve ﬁ",
    "  leading and trailing  ",
    "----------- ===== **** \0 \u200b",
    "<|endoftext|> <unk> <0x0A>",
    "",
]


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unigram") / "tok.model"
    found = train(expand(["embedded"]), str(path), vocab_size=600, kind="unigram", max_bytes=2e5)
    assert found["not_exported_because"] is None
    return path


@pytest.mark.parametrize("text", HARD)
def test_text_survives(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod_id not in ids


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=("Cs",)), max_size=60))
def test_any_text_survives(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_as_documented(tokenizer: TextTokenizer) -> None:
    assert (tokenizer.token(0), tokenizer.token(1), tokenizer.eod_id) == ("<unk>", "<|endoftext|>", 1)
    assert (tokenizer.token(2), tokenizer.token(257)) == ("<0x00>", "<0xFF>")
    assert tokenizer.vocab_size == 700
    digits = [tokenizer.token(i) for i in tokenizer.encode("2048")]
    assert digits == ["2", "0", "4", "8"]


def test_line_breaks_are_learned(tokenizer: TextTokenizer) -> None:
    assert any("\n" in tokenizer.token(i) for i in range(tokenizer.vocab_size))


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    train(expand(["embedded"]), str(tmp_path / "tok.model"), vocab_size=700, max_bytes=5e5)
    assert (tmp_path / "tok.model").read_bytes() == (folder / "tok.model").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokenizer_json_gives_the_same_ids(folder: Path, unigram: Path, kind: str) -> None:
    model = folder / "tok.model" if kind == "bpe" else unigram
    ours = load_tokenizer(section_for(str(model)))
    theirs = load_tokenizer(section_for(str(model.with_name("tokenizer.json"))))
    assert (theirs.vocab_size, theirs.eod_id, theirs.kind) == (ours.vocab_size, ours.eod_id, "huggingface")
    texts = HARD + [text.decode()[:20000] for _, text in documents()][200:230] + ["-" * n for n in range(40)]
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text


def test_transformers_loads_tokenizer_json(folder: Path, tokenizer: TextTokenizer) -> None:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  (1 s, for this test only)

    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert [fast(text)["input_ids"] for text in HARD] == [tokenizer.encode(text) for text in HARD]
    named = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    assert named.eos_token_id == tokenizer.eod_id
    assert len(named) == tokenizer.vocab_size


def test_eod_comes_from_tokenizer_config_when_it_has_no_usual_name(tmp_path: Path) -> None:
    core = {"type": "WordLevel", "vocab": {"a": 0, "<fin>": 1, "[UNK]": 2}, "unk_token": "[UNK]"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": core}))
    assert Backend.from_file(str(path)).get_vocab_size() == 3
    with pytest.raises(ConfigError, match="end-of-document token"):
        load_tokenizer(section_for(str(path)))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<fin>"}}')
    assert load_tokenizer(section_for(str(path))).eod_id == 1
    assert load_tokenizer(Section(kind="huggingface", path=str(path), eod="a")).eod_id == 0


@pytest.mark.parametrize(
    ("section", "content", "text"),
    [
        (Section(path=None), None, "a run needs a tokenizer"),
        (Section(path="absent.model"), None, "No such file"),
        (Section(path="broken.model"), b"garbage", "must be a sentencepiece .model"),
        (Section(path="empty.model"), b"", "must be a sentencepiece .model"),
        (Section(path="wrong.model"), b'{"version": "1.0"}', "data.tokenizer.kind=huggingface"),
        (Section(kind="huggingface", path="broken.json"), b'{"version": 1}', "must be a Hugging Face tokenizer.json"),
        (Section(kind="huggingface", path="wrong.json"), b"\x0a\x0b", "data.tokenizer.kind=sentencepiece"),
    ],
)
def test_bad_tokenizers(
    section: Section, content: bytes | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        assert section.path
        Path(section.path).write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        load_tokenizer(section)


@pytest.mark.parametrize(
    ("vocab_size", "out", "text"),
    [(10**6, "t.model", "Vocabulary size too high"), (100, "t.model", "smaller than"), (400, "t.json", "must end in .model")],
)
def test_bad_training(vocab_size: int, out: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        train(expand(["embedded"]), str(tmp_path / out), vocab_size=vocab_size, max_bytes=5e4)
    assert not list(tmp_path.iterdir())


def test_somebody_elses_tokenizer_json_is_kept(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(ConfigError, match="it is there already"):
        train(expand(["embedded"]), str(tmp_path / "t.model"), vocab_size=400, max_bytes=5e4)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
