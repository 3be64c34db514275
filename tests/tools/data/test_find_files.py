"""What a corpus is made of: each file is read once, refused, or listed as left out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ConfigError
from tools.data.read.find_files import AROUND, EMPTY, HIDDEN, OTHER, OWN, SPECIAL, TWICE, expand


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Root reads everything, so that a test of permissions must not be root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_folder_with_everything_in_it(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    write(elsewhere / "o.txt")
    for name in (
        "a.txt",
        "b.JSONL.GZ",
        "c.jsonl.bz2",
        "d.json.xz",
        "e.txt.zstd",
        "f.ndjson",
        "sub/g.parquet",
        "sub/.deep/no.txt",
    ):
        write(corpus / name)
    os.symlink(elsewhere, corpus / "linked")
    os.symlink("a.txt", corpus / "same.txt")
    os.link(corpus / "f.ndjson", corpus / "sub" / "hard.ndjson")
    os.symlink(tmp_path, corpus / "up")
    os.symlink("sub", corpus / "twice")
    (corpus / "empty.txt").touch()
    for name in (".hidden.txt", ".ipynb_checkpoints/a.txt", "README.md"):
        write(corpus / name)
    os.mkfifo(corpus / "pipe.txt")
    for name in (
        "tokenizer.json",
        "vocab.txt",
        "gone.meta.json",
        "train.meta.json",
        "train.idx",
        "run/config.yaml",
        "run/events.jsonl",
    ):
        write(corpus / name, '{"tokenizer": {}, "unigram_entropy_nats": 1}')
    write(corpus / "songs.meta.json", '{"text": "no meta of token files"}')
    found = expand([str(corpus)])
    read = [os.path.relpath(source.name, corpus) for source in found.sources]
    names = "a.txt b.JSONL.GZ c.jsonl.bz2 d.json.xz e.txt.zstd f.ndjson linked/o.txt songs.meta.json sub/g.parquet"
    assert read == names.split()
    left = {(os.path.relpath(item.path, corpus), item.reason) for item in found.left_out}
    assert left == {
        *((name, HIDDEN) for name in (".hidden.txt", ".ipynb_checkpoints", "sub/.deep")),
        *((name, OWN) for name in ("tokenizer.json", "vocab.txt", "gone.meta.json", "train.meta.json", "run")),
        *((name, TWICE) for name in ("same.txt", "sub/hard.ndjson", "twice")),
        *((name, OTHER) for name in ("README.md", "train.idx")),
        ("empty.txt", EMPTY),
        ("pipe.txt", SPECIAL),
        ("up", AROUND),
    }
    summary = found.left_out_summary()
    assert "\n" not in summary and f"5 {OWN}: " in summary and "…" in summary


def test_what_is_given_twice_is_read_once(tmp_path: Path) -> None:
    first, second = write(tmp_path / "in" / "z.txt"), write(tmp_path / "in" / "a.txt")
    found = expand([str(first), str(tmp_path / "in"), str(second), "embedded", "embedded", f"{tmp_path}/in/../in"])
    assert [source.name for source in found.sources] == [str(first), str(second), "embedded"]
    assert [item.reason for item in found.left_out] == [TWICE] * 4


def test_the_given_tokenizer_is_no_corpus(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.json")
    write(tmp_path / "a.txt")
    assert [item.path for item in expand([str(tmp_path)], tokenizer=str(mine)).left_out] == [str(mine)]


def test_what_cannot_be_read_is_refused_at_once(open_folder: Path) -> None:
    corpus = open_folder / "corpus"
    write(corpus / "good.txt")
    write(corpus / "shut.txt").chmod(0)
    write(corpus / "dark" / "a.txt").parent.chmod(0)
    os.symlink("nowhere", corpus / "dangling.jsonl")
    os.symlink("loop", corpus / "loop")
    try:
        with ordinary_user(), pytest.raises(ConfigError) as caught:
            expand([str(corpus)])
    finally:
        (corpus / "dark").chmod(0o755)
    refused = {os.path.relpath(problem.got, corpus): problem.rule for problem in caught.value.problems}
    assert set(refused) == {"shut.txt", "dark", "dangling.jsonl", "loop"}
    assert "Permission denied" in refused["shut.txt"] and "Permission denied" in refused["dark"]
    assert "No such file" in refused["dangling.jsonl"] and "levels of symbolic links" in refused["loop"]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("tokenizer.json", "this is a tokenizer"),
        ("train.bin", ".bin files are no text"),
        ("texts.tar.gz", ".tar files are no text"),
        ("texts.zip", ".zip files are no text"),
        ("texts.jsonl.lz4", ".lz4 files are no text"),
        ("a.parquet.gz", "Parquet compresses its own pages"),
        ("pipe", "must be a regular file"),
    ],
)
def test_named_files_that_are_no_text(name: str, rule: str, tmp_path: Path) -> None:
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        write(tmp_path / name)
    with pytest.raises(ConfigError, match=rule):
        expand([str(tmp_path / name)])


def test_a_folder_without_text_says_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path / "a.csv")
    with pytest.raises(ConfigError, match=r"1 no corpus by its suffix: .*a\.csv"):
        expand([str(tmp_path)])
