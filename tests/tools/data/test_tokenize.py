"""Tokenising: Megatron reads it, workers don't change it, faults leave nothing behind."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import sentencepiece
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from configs.errors import ConfigError
from pretrain.data.indexed import open_index
from pretrain.data.tokenizer import SentencePieceTokenizer, TextTokenizer, load_tokenizer, section_for
from tools.data.dataset_writer import DatasetWriter
from tools.data.encode import Encoder, words_are_independent
from tools.data.read import corpus as corpus_module
from tools.data.read.embedded_corpus import documents
from tools.data.read.find_files import expand
from tools.data.tokenize import tokenize

TEXTS = ["first text\nwith lines\n", "zweiter Text: äöü 日本語", "3rd"]


def texts_in(prefix: Path, tokenizer: TextTokenizer) -> list[str]:
    index = open_index(str(prefix))
    return [tokenizer.decode(index.document_tokens(k).tolist()) for k in range(index.num_documents)]


def test_megatron_reads_the_files(folder: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """And its own builder would have written the same bytes."""
    theirs = IndexedDataset(str(folder / "embedded"))
    ours = open_index(str(folder / "embedded"))
    assert len(theirs) == ours.num_documents > 20
    assert int(theirs.sequence_lengths.sum()) == ours.num_tokens
    texts = [text.decode() for _, text in documents()][: len(theirs)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for number, text in enumerate(texts):
        ids = [*tokenizer.encode(text), tokenizer.eod_id]
        assert theirs[number].tolist() == ids  # pyright: ignore[reportAttributeAccessIssue]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"theirs{suffix}").read_bytes() == Path(f"{folder / 'embedded'}{suffix}").read_bytes()


def test_files_are_the_same_for_any_number_of_workers(
    folder: Path, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", 20000)
    tokenize(expand(["embedded"]), tokenizer, str(tmp_path / "three"), workers=3, max_bytes=5e5)
    for suffix in (".bin", ".idx", ".meta.json"):
        assert (tmp_path / f"three{suffix}").read_bytes() == Path(f"{folder / 'embedded'}{suffix}").read_bytes()


def test_meta_counts(folder: Path, tokenizer: TextTokenizer) -> None:
    meta = json.loads((folder / "embedded.meta.json").read_text())
    tokens = open_index(str(folder / "embedded")).tokens()
    shares = np.bincount(tokens) / len(tokens)
    shares = shares[shares > 0]
    assert meta["num_tokens"] == len(tokens)
    assert meta["max_token_id"] == int(tokens.max())
    assert meta["tokenizer"] == {**tokenizer.identity(), "eod_id": tokenizer.eod_id}
    assert meta["unigram_entropy_nats"] == pytest.approx(-(shares * np.log(shares)).sum())


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=st.sampled_from(" \n\tabcéE1▁.日-="), max_size=80))
def test_words_one_by_one_are_the_text(tokenizer: TextTokenizer, text: str) -> None:
    encoder = Encoder(tokenizer, np.dtype(np.uint16), append_eod=False)
    assert encoder.words is not None
    assert np.frombuffer(encoder.encode([text])[0], np.uint16).tolist() == tokenizer.encode(text)


def test_words_are_trusted_only_when_no_piece_crosses_them(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert words_are_independent(tokenizer.proto)
    text = " ".join(f"of the {k}" for k in range(3000))
    common = {"sentence_iterator": iter(text.split("9")), "vocab_size": 400, "model_type": "bpe", "byte_fallback": True}
    common |= {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    for change in ({"split_by_whitespace": False}, {"add_dummy_prefix": True}, {"normalization_rule_name": "nfkc"}):
        common["sentence_iterator"] = iter(text.split("9"))
        prefix = str(tmp_path / "t")
        sentencepiece.SentencePieceTrainer.train(**{**common, **change}, model_prefix=prefix, hard_vocab_limit=False)
        assert not words_are_independent(Path(prefix + ".model").read_bytes()), change


def test_large_vocabularies_take_four_bytes_and_hugging_face_agrees(
    folder: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    """A tokenizer.json with an id of 70,000: int32, the same ids."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [{"id": 70000, "content": "<far>", "special": True, **plain}]
    spec["model"]["vocab"]["<far>"] = 70000
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "a.txt").write_text(TEXTS[1])
    far = load_tokenizer(section_for(str(tmp_path / "tokenizer.json")))
    assert tokenize(expand([str(tmp_path / "a.txt")]), far, str(tmp_path / "a"))["dtype"] == "int32"
    theirs = IndexedDataset(str(tmp_path / "a"))  # kept: its arrays are views that die with it
    assert theirs[0].tolist() == [*tokenizer.encode(TEXTS[1]), tokenizer.eod_id]  # pyright: ignore[reportAttributeAccessIssue]


def make(path: Path, form: str) -> str:
    lines = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
    match form:
        case "txt":
            path.mkdir()
            for number, text in enumerate(TEXTS):
                (path / f"{number}.txt").write_text(text)
        case "jsonl":
            path.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"))
        case "gz":
            path.write_bytes(gzip.compress(lines[:30]) + gzip.compress(lines[30:]) + b"\0" * 100)
        case "zst":
            path.write_bytes(zstandard.compress(lines[:30]) + zstandard.compress(lines[30:]))
        case "json":
            path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
        case "parquet":
            pa.parquet.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3]}), path)  # pyright: ignore[reportAttributeAccessIssue]
        case "blocks":
            path.write_text("\n\n".join(text.strip() for text in TEXTS))
    return str(path)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("folder", "txt"),
        ("a.jsonl", "jsonl"),
        ("a.jsonl.gz", "gz"),
        ("a.jsonl.zst", "zst"),
        ("a.json", "json"),
        ("a.parquet", "parquet"),
        ("a.txt", "blocks"),
    ],
)
def test_every_form_gives_the_same_documents(name: str, form: str, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    source = make(tmp_path / name, form)
    tokenize(expand([source], split_blank_lines=form == "blocks"), tokenizer, str(tmp_path / "out" / "data"))
    wanted = [text.strip() for text in TEXTS] if form == "blocks" else TEXTS
    found = texts_in(tmp_path / "out" / "data", tokenizer)
    assert [text.strip() for text in found] == [text.strip() for text in wanted]
    if form != "blocks":
        assert found == wanted


def test_blocks_of_lines_are_put_together_again(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small reads: lines and their numbers survive."""
    monkeypatch.setattr("tools.data.read.file_blocks.BATCH_BYTES", 37)
    texts = [f"text number {k} " * (k % 7 + 1) for k in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenize(expand([str(tmp_path / "a.jsonl")]), tokenizer, str(tmp_path / "a"))
    assert texts_in(tmp_path / "a", tokenizer) == texts
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": 5}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:201"):
        tokenize(expand([str(tmp_path / "a.jsonl")]), tokenizer, str(tmp_path / "b"))


BAD = {
    "latin.txt": ("gr\xfcn".encode("latin1"), r"byte 2 is 0xfc"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xfc"}\n', r"latin\.jsonl:2.*byte 24 is 0xfc"),
    "key.jsonl": (b'{"text": "a"}\n\n{"txt": "a"}\n', r"key\.jsonl:3.*'text'.*has: txt"),
    "type.jsonl": (b'{"text": 7}\n', r"type\.jsonl:1.*must be a text"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl:1.*JSON object"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": ', r"cut\.jsonl:2.*one JSON object"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', r"surrogate\.jsonl:1.*surrogate"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 100)[:-12], r"ends in the middle"),
    "broken.jsonl.gz": (b"no gzip", r"gzip data must be whole"),
    "cut.jsonl.zst": (zstandard.compress(os.urandom(1000).hex().encode())[:-9], r"ends in the middle"),
    "broken.jsonl.zst": (b"no zstd", r"zstd data must be whole"),
    "broken.parquet": (b"PAR1 no parquet", r"must be Parquet"),
    "broken.json": (b"[1,", r"must be JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_and_leave_nothing(name: str, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    content, text = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        tokenize(expand([str(tmp_path / name)]), tokenizer, str(tmp_path / "out"))
    assert len(caught.value.problems) == 1
    assert re.search(text, str(caught.value).replace("\n", " "))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_all_bad_files_are_named_at_once_and_former_files_kept(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, (content, _) in BAD.items():
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    tokenize(expand([str(tmp_path / "good.txt")]), tokenizer, str(tmp_path / "out"))
    former = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ConfigError) as caught:
        tokenize(expand([str(tmp_path / "good.txt"), str(tmp_path / "in")]), tokenizer, str(tmp_path / "out"), workers=2)
    assert len(caught.value.problems) == len(BAD)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == former


def test_missing_and_empty_sources_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as caught:
        expand([str(tmp_path / "empty.txt"), str(tmp_path / "folder"), str(tmp_path / "absent")])
    assert [problem.rule[:25] for problem in caught.value.problems] == [
        "the file must not be empt",
        "a folder must hold files ",
        "the file must exist",
    ]


def test_parquet_without_the_column(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"body": ["a", None]}), tmp_path / "a.parquet")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="it has body"):
        tokenize(expand([str(tmp_path / "a.parquet")]), tokenizer, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="row 1"):
        tokenize(expand([str(tmp_path / "a.parquet")]), tokenizer, str(tmp_path / "out"), text_key="body")


def test_no_text_at_all(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ConfigError, match="there must be some text"):
        tokenize(expand([str(tmp_path / "a.jsonl")]), tokenizer, str(tmp_path / "out"))


def test_output_that_cannot_be_written(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (str(tmp_path), str(tmp_path / "file" / "data"), "/proc/nowhere/data"):
        with pytest.raises(ConfigError, match="--out"):
            tokenize(expand([str(tmp_path / "file")]), tokenizer, out)


def test_a_full_disk_is_a_report_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the same refusal of a write."""
    (tmp_path / "a.txt").write_text("some text " * 20000)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        "from configs.errors import ConfigError; from tools.data.cli import main\n"
        "try: main(sys.argv[1:])\nexcept ConfigError as error: sys.exit(str(error))"
    )
    arguments = ["tokenize", "--corpus", str(tmp_path / "a.txt"), "--tokenizer", str(folder / "tok.model"), "--workers", "1"]
    command = [sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[3])
    assert done.stderr.startswith("1 problem:") and "File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_one_writer_a_prefix(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with DatasetWriter(str(tmp_path / "out"), np.dtype(np.uint16)), pytest.raises(ConfigError, match="another process"):
        tokenize(expand([str(tmp_path / "a.txt")]), tokenizer, str(tmp_path / "out"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_final_file(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    """Killed while a named pipe keeps it waiting for more text; and no worker outlives it."""
    os.mkfifo(tmp_path / "endless.txt")
    (tmp_path / "a.txt").write_text("some text " * 1000)
    code = (
        "import sys; from tools.data import cli; from tools.data.read import find_files\n"
        "sources = [find_files.CorpusSource(p, 'lines' if 'end' in p else 'text', '', 1) for p in sys.argv[1:3]]\n"
        "find_files.expand = lambda *_: find_files.Corpus(sources)\n"
        "sys.exit(cli.main(sys.argv[3:]))"
    )
    arguments = [
        "tokenize",
        "--corpus",
        "x",
        "--tokenizer",
        str(folder / "tok.model"),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "2",
    ]
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt"), str(tmp_path / "endless.txt"), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(__file__).resolve().parents[3])
    with open(tmp_path / "endless.txt", "wb"):  # opens once the tool reads it
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (workers := children.read_text().split()):
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == (1 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not list(tmp_path.glob("out.bin")) + list(tmp_path.glob("out.idx")) + list(tmp_path.glob("out.meta.json"))
    if number == signal.SIGTERM:
        assert not list(tmp_path.glob("*.partial*"))
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers)
