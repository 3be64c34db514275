"""Odd input to `phalanx data tokenize`: compressed, broken, nested, badly named, with bad lines; and workers that die."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from configs.errors import ConfigError
from pretrain.data.tokenizer import TextTokenizer
from tests.tools.data.test_tokenize import texts_in
from tools.cli import run
from tools.data.read.file_blocks import BATCH_BYTES, chunks
from tools.data.read.find_files import expand
from tools.data.tokenize import tokenize

ROOT = Path(__file__).resolve().parents[3]
LINES = b'{"text": "one"}\n{"text": "two"}\n'
ZEROS = b"\0" * 70_000
SKIPPABLE = b"\x50\x2a\x4d\x18\x03\0\0\0abc"


def zstd_with_window(content: bytes, window_log: int) -> bytes:
    """As `zstd --long=N` of a stream: the frame asks for the window, whatever the size of the content."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, hash_log=6, chain_log=6)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(content) + stream.flush()


WHOLE = {
    "a.jsonl.bz2": bz2.compress(LINES[:9]) + bz2.compress(LINES[9:]),
    "a.jsonl.xz": lzma.compress(LINES[:9]) + b"\0" * 8 + lzma.compress(LINES[9:]),
    "a.JSONL.GZ": gzip.compress(LINES[:9]) + ZEROS + gzip.compress(LINES[9:]) + ZEROS,
    "a.jsonl.zstd": SKIPPABLE + zstandard.compress(LINES[:9]) + SKIPPABLE + zstandard.compress(LINES[9:]) + SKIPPABLE,
    "long.jsonl.zst": zstd_with_window(LINES, 31),
}


@pytest.mark.parametrize("name", WHOLE)
def test_compressed_files_are_read_whole(name: str, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WHOLE[name])
    tokenize(expand([str(tmp_path / name)]), tokenizer, str(tmp_path / "out"))
    assert texts_in(tmp_path / "out", tokenizer) == ["one", "two"]


BROKEN = {
    **{f"cut.{name}": content[:-12] for name, content in WHOLE.items() if name not in ("a.JSONL.GZ", "a.jsonl.zstd")},
    "cut.jsonl.gz": gzip.compress(LINES)[:-3],
    "zeros.jsonl.gz": ZEROS,
    "more.jsonl.bz2": bz2.compress(LINES) + b"no bzip2",
    "more.jsonl.xz": lzma.compress(LINES) + b"not xz at all",
    "more.jsonl.gz": gzip.compress(LINES) + b"no gzip",
    "other.jsonl.bz2": gzip.compress(LINES),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_compressed_files_are_refused(name: str, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(ConfigError, match="data must be whole"):
        tokenize(expand([str(tmp_path / name)]), tokenizer, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == [name]


def test_little_compressed_data_never_becomes_a_large_chunk(tmp_path: Path) -> None:
    """20 MB of zeros are about a thousand bytes of bzip2."""
    (tmp_path / "a.bz2").write_bytes(bz2.compress(b"\0" * 20_000_000))
    sizes = [len(plain) for plain, _ in chunks(str(tmp_path / "a.bz2"), "bzip2")]
    assert max(sizes) <= BATCH_BYTES and sum(sizes) == 20_000_000


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "text".encode("utf-16"), "iconv -f UTF-16 "),
        ("a.txt", "text".encode("utf-16-le"), "byte 1 is one: is it UTF-16"),
        ("a.jsonl", gzip.compress(LINES), "add .gz to its name"),
        ("a.jsonl", zstandard.compress(LINES), "add .zst to its name"),
    ],
    # gzip writes the time: without names of their own, two test processes would see different tests.
    ids=["utf-16 with mark", "utf-16 without mark", "gzip", "zstd"],
)
def test_files_that_are_not_what_their_name_says(
    name: str, content: bytes, text: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(text)):
        tokenize(expand([str(tmp_path / name)]), tokenizer, str(tmp_path / "out"))


def test_undecodable_names(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    Path(name).write_text("text")
    out = os.fsdecode(os.fsencode(tmp_path) + b"/o\xfe")
    arguments = ["tokenize", "--corpus", name, str(tmp_path), "--tokenizer", str(folder / "tok.model"), "--workers", "1"]
    assert run(["data", *arguments, "--out", out, "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["corpus"] == json.loads(Path(out + ".meta.json").read_text())["corpus"] == [f"{tmp_path}/\\xff.txt"]
    Path(name).write_bytes(b"\xff")
    assert run(["data", *arguments, "--out", out, "--json"]) == 2
    assert "text must be UTF-8" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "x": ' + '{"}": [' * 300 + "]}" * 300 + "}\n"),
        ("a.json", "[" * 100_000 + "]" * 100_000),
        ("a.json", "[" + '{"a":' * 700 + "1" + "}" * 700 + "]"),
    ],
)
def test_deeply_nested_json(name: str, content: str, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=r"recursion|levels deep"):
        tokenize(expand([str(tmp_path / name)]), tokenizer, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == [name]


def test_many_brackets_in_a_text_are_no_nesting(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    text = '["{\\' * 1000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    tokenize(expand([str(tmp_path / "a.jsonl")]), tokenizer, str(tmp_path / "out"))
    assert texts_in(tmp_path / "out", tokenizer) == [text]


@pytest.fixture
def bad_lines(tmp_path: Path) -> Path:
    """Seven bad ones in three kinds of files."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": f"line {k}"}).encode() for k in range(400)]
    for k, bad in ((7, b"{"), (200, b'{"text": null}'), (399, b'{"text": "\xff"}'), (8, b'{"no": 1}')):
        lines[k] = bad
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    (folder / "b.json").write_text('["item", 5, {"text": "object"}]')
    pa.parquet.write_table(pa.table({"text": ["row", None]}), folder / "c.parquet")  # pyright: ignore[reportAttributeAccessIssue]
    (folder / "d.txt").write_bytes(b"latin \xfc")
    return folder


def test_bad_lines_are_passed_over_counted_and_listed(
    bad_lines: Path, folder: Path, tokenizer: TextTokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("tools.data.read.file_blocks.BATCH_BYTES", 500)
    found = tokenize(expand([str(bad_lines)]), tokenizer, str(tmp_path / "one"), skip_bad=7)
    assert texts_in(tmp_path / "one", tokenizer)[395:] == ["line 398", "item", "object", "row"]
    places = [item["place"].removeprefix(f"{bad_lines}/") for item in found["skipped"]]
    assert places == ["a.jsonl:8", "a.jsonl:9", "a.jsonl:201", "a.jsonl:400", "b.json:2", "c.parquet row 1", "d.txt"]
    assert found["num_skipped"] == 7
    arguments = ["tokenize", "--corpus", str(bad_lines), "--tokenizer", str(folder / "tok.model"), "--workers", "2"]
    assert run(["data", *arguments, "--out", str(tmp_path / "two"), "--skip-bad", "100"]) == 0
    assert "7 bad lines" in (shown := capfd.readouterr().err) and f"{bad_lines}/b.json:2: " in shown
    for suffix in (".bin", ".idx", ".meta.json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    arguments[-1] = "1"
    assert run(["data", *arguments, "--out", str(tmp_path / "three"), "--skip-bad", "6"]) == 2
    assert "at least 7 are bad" in capfd.readouterr().err
    assert not list(tmp_path.glob("three*"))


def test_bad_lines_of_training_text(bad_lines: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "tokenizer", "--corpus", str(bad_lines), "embedded", "--max-mb", "0.03", "--vocab-size", "400"]
    assert run([*arguments, "--out", str(tmp_path / "t.model")]) == 2
    capfd.readouterr()
    assert run([*arguments, "--out", str(tmp_path / "t.model"), "--skip-bad", "7", "--json"]) == 0
    shown = capfd.readouterr()
    assert [item["place"] for item in json.loads(shown.out)["skipped"]] == [f"{bad_lines}/d.txt"]  # 30 kB have no other
    assert f"1 bad lines, rows or documents were passed over:\n  {bad_lines}/d.txt" in shown.err


COLUMNS = {
    "int": pa.array([1]),
    "bool": pa.array([True]),
    "list": pa.array([["a"]]),
    "struct": pa.array([{"a": "b"}]),
    "time": pa.array([0], pa.timestamp("s")),
    "fixed": pa.array([b"abcd"], pa.binary(4)),
    "numbers": pa.array([1]).dictionary_encode(),
    "null": pa.nulls(1),
    "texts": pa.array(["é"]),
    "large": pa.array(["é"], pa.large_string()),
    "bytes": pa.array(["é".encode()]),
    "dictionary": pa.array(["é"]).dictionary_encode(),
    "view": pa.array(["é"], pa.string_view()),
}


def test_parquet_columns(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table(COLUMNS), path)  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("texts", "large", "bytes", "dictionary", "view"):
        tokenize(expand([str(path)]), tokenizer, str(tmp_path / "out"), text_key=name)
        assert texts_in(tmp_path / "out", tokenizer) == ["é"], name
    for name in set(COLUMNS) - {"texts", "large", "bytes", "dictionary", "view"}:
        with pytest.raises(ConfigError, match=r"must be of texts, it is of .* columns of texts: texts, large"):
            tokenize(expand([str(path)]), tokenizer, str(tmp_path / "no"), text_key=name)


def test_a_killed_worker_is_a_report(folder: Path, tmp_path: Path) -> None:
    """Killed while the command waits for more text from a named pipe."""
    os.mkfifo(tmp_path / "endless.jsonl")
    code = (
        "import sys; from tools.cli import run; from tools.data.read import find_files\n"
        "sources = [find_files.CorpusSource(sys.argv[1], 'lines', '', 1)]\n"
        "find_files.expand = lambda *_: find_files.Corpus(sources)\n"
        "sys.exit(run(sys.argv[2:]))"
    )
    arguments = ["data", "tokenize", "--corpus", "x", "--tokenizer", str(folder / "tok.model"), "--workers", "2", "--json"]
    command = [sys.executable, "-c", code, str(tmp_path / "endless.jsonl"), *arguments, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with open(tmp_path / "endless.jsonl", "wb", buffering=0) as pipe:
        line = b'{"text": "' + b"word " * 300_000 + b'"}\n'
        pipe.write(line)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (workers := [pid for pid in children.read_text().split() if _is_worker(pid)]):
            time.sleep(0.01)
        os.kill(int(workers[0]), signal.SIGKILL)
        time.sleep(0.2)
        pipe.write(line)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process was killed or died" in err and "Traceback" not in err
    assert json.loads(out)["ok"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["endless.jsonl"]


def _is_worker(pid: str) -> bool:
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("spare", (4, 10))
def test_workers_that_cannot_start_are_a_report(spare: int, folder: Path, tmp_path: Path) -> None:
    """Too few open files are allowed, so that the start fails in one place or another."""
    (tmp_path / "a.txt").write_text("some text")
    code = (
        "import os, resource, sys; from tools.cli import run; import tools.data.cli, tools.data.tokenize\n"
        "import concurrent.futures.process, multiprocessing.queues, multiprocessing.popen_spawn_posix\n"
        "import rich.console, sentencepiece\n"
        "limit = len(os.listdir('/proc/self/fd')) + int(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)); sys.exit(run(sys.argv[2:]))"
    )
    arguments = [
        "data",
        "tokenize",
        "--corpus",
        str(tmp_path / "a.txt"),
        "--tokenizer",
        str(folder / "tok.model"),
        "--workers",
        "4",
    ]
    command = [sys.executable, "-c", code, str(spare), *arguments, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    names = sorted(path.name for path in tmp_path.iterdir())
    if done.returncode == 0:
        assert names == ["a.txt", "out.bin", "out.idx", "out.meta.json"]
    else:
        assert done.returncode in (1, 2) and "problem" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert names == ["a.txt"]
