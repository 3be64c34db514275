"""The tokenizer files of an export: AutoTokenizer gives the ids of the run's sentencepiece model, or a note says why not."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer, BertGenerationTokenizer

from pretrain.checkpoint.manifest import read_manifest
from pretrain.data.tokenizer import load_tokenizer, section_for
from tests.tools.convert.test_families import run_export, run_import
from tests.tools.convert.tiny import make as make_model
from tools.convert.tokenizer_files import (
    SENTENCEPIECE_CLASS,
    SENTENCEPIECE_FILE,
    WITHOUT_SLOW_TOKENIZER,
    find_tokenizer,
    write_tokenizer,
)
from tools.data.read.embedded_corpus import documents
from tools.data.train_tokenizer import _passages

UNCHANGED = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
# options of the trainer, whether a tokenizer.json can be equal
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "user-defined symbols": (UNCHANGED | {"user_defined_symbols": ["<sep>", "<|im_start|>"]}, True),
    "no byte fallback": (UNCHANGED | {"byte_fallback": False, "character_coverage": 0.99}, True),
    "dummy prefix (Llama, Mistral)": (LLAMA, True),
    "dummy prefix and user-defined symbols": (LLAMA | {"user_defined_symbols": ["<sep>"]}, False),
    "a unigram made elsewhere": (UNCHANGED | {"model_type": "unigram"}, False),
    "a unigram without byte fallback": (UNCHANGED | {"model_type": "unigram", "byte_fallback": False}, False),
    "nmt_nfkc": ({}, False),
    "characters": ({"model_type": "char", "byte_fallback": False, "vocab_size": 80}, False),
}
TEXTS = [
    "Hello world", "  two  spaces ", "a<sep>b <sep><|im_start|> c", "naïve ½ ① ﬁ\n\tx", "日本語 🎉", "<0x0A> <unk>", "▁a", " a",
    "", "-" * 61, "*" * 13, " " * 33, "def f(x):\n\treturn  x + 12\n\n",
]  # fmt: skip
FAMILIES = ("qwen3_moe", "deepseek_v3", "glm4_moe", "mixtral")


@pytest.fixture(scope="module")
def passages() -> list[str]:
    return [passage for _, text in list(documents())[:10] for passage in _passages([text.decode()])]


def make(folder: Path, passages: list[str], options: dict[str, Any]) -> Path:
    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "num_threads": 2, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(passages), model_writer=model, max_sentence_length=8192, **settings
    )
    (folder / "tok.model").write_bytes(model.getvalue())
    return folder / "tok.model"


@pytest.mark.parametrize("kind", MODELS)
def test_autotokenizer_gives_the_ids_of_sentencepiece(kind: str, passages: list[str], tmp_path: Path) -> None:
    options, has_json = MODELS[kind]
    tokenizer = load_tokenizer(section_for(str(make(tmp_path, passages, options))))
    for family in FAMILIES:
        out = tmp_path / family
        out.mkdir()
        (out / "config.json").write_text(json.dumps({"model_type": family}))
        notes = write_tokenizer(out, tmp_path / "nowhere", tokenizer, family)
        assert (out / "tokenizer.json").exists() == (out / "tokenizer.model").exists() == has_json
        assert (out / SENTENCEPIECE_FILE).exists() == bool(notes) == (not has_json)
        if not has_json and family in WITHOUT_SLOW_TOKENIZER:
            # Another tokenizer, with other ids and without a warning, would be the worst answer.
            assert "AutoTokenizer of transformers 5 refuses" in notes[0]
            with pytest.raises(ValueError, match="backend tokenizer"):
                AutoTokenizer.from_pretrained(out, local_files_only=True)
            loaded: Any = BertGenerationTokenizer.from_pretrained(out, local_files_only=True)
        else:
            loaded = AutoTokenizer.from_pretrained(out, local_files_only=True)
            assert has_json or (type(loaded).__name__ == SENTENCEPIECE_CLASS and SENTENCEPIECE_CLASS in notes[0])
        assert [loaded(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert loaded.eos_token_id == tokenizer.eod_id and len(loaded) == tokenizer.vocab_size
        if has_json:
            ids = [tokenizer.encode(text) for text in TEXTS]
            assert [loaded.decode(each) for each in ids] == [tokenizer.decode(each) for each in ids]


KIMI = {
    "tiktoken.model": "IQ== 0\n", "vocab.txt": "a\nb\n", "special_tokens_map.json": "{}", "chat_template.jinja": "{{ 1 }}",
    "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_kimi.X", null]}}',
    "tokenization_kimi.py": "from .tool_declaration import y\nraise SystemExit('run')\n", "tool_declaration.py": "y = 1\n",
    "additional_chat_templates/tools.jinja": "{{ 2 }}",
}  # fmt: skip
LEFT_OUT = {"modeling_kimi.py": "raise SystemExit('run')\n", "README.md": "", "docs/a.md": "", "pytorch_model.bin": ""}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_every_tokenizer_file_of_an_import_is_carried_over(tmp_path: Path) -> None:
    make_model("kimi", tmp_path / "hf")
    write(tmp_path / "hf", KIMI | LEFT_OUT)
    notes = run_import(tmp_path / "hf", tmp_path / "checkpoint")["notes"]
    assert notes == ["not carried over: docs/, modeling_kimi.py, pytorch_model.bin; code of the folder is never run"]
    assert not run_export(tmp_path / "checkpoint", tmp_path / "out")["notes"]
    for name, text in KIMI.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not any((tmp_path / "out" / name).exists() for name in LEFT_OUT)


def test_a_named_tokenizer_is_exported_with_an_import_that_has_none(folder: Path, tmp_path: Path) -> None:
    make_model("qwen3", tmp_path / "hf", vocab_size=704)
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    notes = run_export(tmp_path / "checkpoint", tmp_path / "without")["notes"]
    assert notes == ["no tokenizer was found: add its files, or name it with --tokenizer PATH"]
    assert not run_export(tmp_path / "checkpoint", tmp_path / "with", tokenizer_path=str(folder / "tok.model"))["notes"]
    tokenizer = load_tokenizer(section_for(str(folder / "tok.model")))
    assert AutoTokenizer.from_pretrained(tmp_path / "with")(TEXTS[-1])["input_ids"] == tokenizer.encode(TEXTS[-1])
    # An import's own generation settings stay.
    assert (tmp_path / "with" / "generation_config.json").read_bytes() == (
        tmp_path / "hf" / "generation_config.json"
    ).read_bytes()


def test_a_named_tokenizer_replaces_one_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    make_model("qwen3", tmp_path / "hf", vocab_size=704)
    write(tmp_path / "hf", {"tiktoken.model": "IQ== 0\n"})
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    (note,) = run_export(tmp_path / "checkpoint", tmp_path / "out", tokenizer_path=str(folder / "tok.model"))["notes"]
    assert "the tokenizer that came with the import was left out" in note
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "tiktoken.model").exists()


def test_a_tokenizer_model_that_came_with_an_import_is_used(folder: Path, tmp_path: Path) -> None:
    make_model("llama", tmp_path / "hf", vocab_size=704)
    write(tmp_path / "hf", {})
    (tmp_path / "hf" / "tokenizer.model").write_bytes((folder / "tok.model").read_bytes())
    run_import(tmp_path / "hf", tmp_path / "checkpoint")
    checkpoint = tmp_path / "checkpoint"
    found = find_tokenizer(read_manifest(checkpoint), checkpoint, None)
    assert found is not None and found.encode(TEXTS[-1]) == load_tokenizer(section_for(str(folder / "tok.model"))).encode(
        TEXTS[-1]
    )


def test_a_tokenizer_json_of_another_name_is_the_one_exported(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for name, words in (("mine.json", {"</s>": 0, "mine": 1}), ("tokenizer.json", {"</s>": 0, "other": 1})):
        Tokenizer(WordLevel(words, unk_token="</s>")).save(str(place / name))
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(section_for(str(place / "mine.json")))
    assert not write_tokenizer(tmp_path / "out", tmp_path / "nowhere", tokenizer, "llama")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (place / "mine.json").read_bytes()
