"""Every lie that token files can tell is a problem, never a traceback."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs import schema
from configs.errors import Problem
from pretrain.data import order_cache
from pretrain.data.indexed import HEADER, index_problems, open_index
from pretrain.data.tokenizer import TextTokenizer, vocab_size
from pretrain.preflight.data import check_data
from tests.pretrain.data.conftest import write_pair


@pytest.fixture
def copy(folder: Path, tmp_path: Path, config: schema.Config) -> Path:
    """A prefix that a test may spoil; the config trains on it."""
    for suffix in (".bin", ".idx", ".meta.json"):
        shutil.copy(f"{folder / 'embedded'}{suffix}", f"{tmp_path / 'data'}{suffix}")
    config.data.train = [schema.BlendPart(str(tmp_path / "data"))]
    return tmp_path / "data"


def text(problems: list[Problem]) -> str:
    return " | ".join(f"{problem.path}: {problem.rule}" for problem in problems)


def put(path: Path, offset: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(content)


def test_good_data_has_no_problems(config: schema.Config, tokenizer: TextTokenizer) -> None:
    assert check_data(config) == []
    assert vocab_size(config) == tokenizer.vocab_size
    config.model.vocab_size = 1000
    assert vocab_size(config) == 1000
    assert check_data(config) == []


def spoil_idx(kind: str, idx: Path, sequences: int) -> None:
    lengths, pointers = HEADER.size, HEADER.size + 4 * sequences
    documents = pointers + 8 * sequences
    changes: dict[str, tuple[int, bytes]] = {
        "magic": (0, b"XX"),
        "version": (9, struct.pack("<Q", 2)),
        "dtype": (17, b"\x06"),
        "count": (18, struct.pack("<Q", sequences + 1)),
        "huge": (18, struct.pack("<Q", 2**63)),
        "length": (lengths + 8, struct.pack("<i", -5)),
        "pointer": (pointers + 24, struct.pack("<q", 3)),
        "start": (pointers, struct.pack("<q", 2)),
        "order": (documents + 16, struct.pack("<q", 10**9)),
        "ends": (documents + 8 * sequences, struct.pack("<q", sequences - 1)),
    }
    put(idx, *changes[kind])


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("magic", "begins with b'MMIDIDX"),
        ("version", "version must be 1, it is 2"),
        ("dtype", "dtype code must be one of"),
        ("count", "make a file of"),
        ("huge", "make a file of"),
        ("length", "a length is at least 0, sequence 2 has -5"),
        ("pointer", "sequences lie one after another, sequence 3 begins at byte 3"),
        ("start", "the first sequence begins at byte 0"),
        ("order", "document marks never decrease, mark 3 does"),
        ("ends", "document marks run from 0 to"),
    ],
)
def test_an_idx_that_lies(kind: str, rule: str, copy: Path, config: schema.Config) -> None:
    spoil_idx(kind, Path(f"{copy}.idx"), open_index(str(copy)).num_sequences)
    problems = check_data(config)
    assert rule in text(problems)
    assert all(problem.path == "data.train[0].path" and problem.fix for problem in problems)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda p: Path(f"{p}.bin").unlink(), "must both exist"),
        (lambda p: Path(f"{p}.idx").unlink(), "must both exist"),
        (lambda p: Path(f"{p}.bin").write_bytes(b""), "must not be empty"),
        (lambda p: Path(f"{p}.idx").write_bytes(b""), "must not be empty"),
        (lambda p: Path(f"{p}.idx").write_bytes(b"MMIDIDX"), "has a header of 34 bytes"),
        (lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes()[:-100]), "it is truncated"),
        (lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes() + b"  "), "it is longer than"),
        (lambda p: Path(f"{p}.meta.json").write_text("{"), "must be what phalanx data tokenize wrote"),
        (lambda p: Path(f"{p}.meta.json").write_text("[]"), "must be what phalanx data tokenize wrote"),
        (lambda p: put(Path(f"{p}.bin"), 0, b"\xff\xff"), "token 0 is 65535"),
    ],
)
def test_spoiled_files(spoil: Callable[[Path], None], rule: str, copy: Path, config: schema.Config) -> None:
    spoil(copy)
    assert rule in text(check_data(config))


def test_data_of_another_tokenizer(copy: Path, config: schema.Config) -> None:
    meta = json.loads(Path(f"{copy}.meta.json").read_text())
    meta["tokenizer"]["sha256"] = "0" * 64
    Path(f"{copy}.meta.json").write_text(json.dumps(meta))
    assert "tokenised with another tokenizer (sha256 000000000000…)" in text(check_data(config))
    Path(f"{copy}.meta.json").unlink()
    assert check_data(config) == []


def test_data_with_another_end_of_document(copy: Path, config: schema.Config) -> None:
    config.data.tokenizer.eod = "<unk>"
    assert "documents end with token 1, the run takes 0" in text(check_data(config))


def test_meta_of_other_files(copy: Path, config: schema.Config) -> None:
    meta = json.loads(Path(f"{copy}.meta.json").read_text())
    Path(f"{copy}.meta.json").write_text(json.dumps({**meta, "num_tokens": 1}))
    assert "states" in text(check_data(config))


def test_all_problems_at_once(config: schema.Config) -> None:
    config.model.vocab_size = 10
    config.data.train = [schema.BlendPart("absent/a"), schema.BlendPart("absent/b")]
    config.data.valid = [schema.BlendPart("absent/c")]
    found = text(check_data(config))
    assert "must be at least the tokenizer's 700" in found
    assert all(name in found for name in ("data.train[0].path", "data.train[1].path", "data.valid[0].path"))
    config.data.tokenizer.path = None
    config.data.train = []
    found = text(check_data(config))
    assert "a run needs a tokenizer" in found and "a run needs something to train on" in found


def test_too_little_text(config: schema.Config, tmp_path: Path) -> None:
    config.data.train = [schema.BlendPart(write_pair(tmp_path / "short", [[5, 1]] * 20))]
    assert "one sample needs batch.seq_length_tokens + 1 = 65 tokens, the part has 36" in text(check_data(config))
    config.data.train = [schema.BlendPart(write_pair(tmp_path / "short", [[5] * 99 + [1], [6, 1]]))]
    assert "the documents held out must hold one sample of 65" in text(check_data(config))
    config.run.eval_batches = 0
    assert check_data(config) == []
    config.data.valid = [schema.BlendPart(write_pair(tmp_path / "valid", [[5, 1]]))]
    assert "data.valid[0].path" in text(check_data(config))


def test_a_share_too_small(config: schema.Config) -> None:
    config.data.train = [config.data.train[0], schema.BlendPart(config.data.train[0].path, 1e-7)]
    assert "share of the blend must be at least 1e-05" in text(check_data(config))


def test_large_data_needs_a_cache_folder(config: schema.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_cache, "CACHED_ENTRIES", 1)
    assert check_data(config) == []
    (tmp_path / "file").write_text("")
    config.data.cache_dir = str(tmp_path / "file" / "cache")
    assert "data.cache_dir" in text(check_data(config))


def test_long_indices_are_checked_in_blocks(tmp_path: Path) -> None:
    """Both ends always; a whole check finds what lies between."""
    prefix = write_pair(tmp_path / "long", [[5]] * 5000)
    index = open_index(prefix)
    put(Path(f"{prefix}.idx"), HEADER.size + 4 * 5000 + 8 * 4998, struct.pack("<q", 1))
    assert len(index_problems(index, limit=640)) == 1
    put(Path(f"{prefix}.idx"), HEADER.size + 4 * 5000 + 8 * 4998, struct.pack("<q", 4998 * 2))
    put(Path(f"{prefix}.idx"), HEADER.size + 4 * 5000 + 8 * 50, struct.pack("<q", 1))
    assert index_problems(open_index(prefix), limit=640) == []
    assert len(index_problems(open_index(prefix), limit=None)) == 1


def test_negative_ids(config: schema.Config, tmp_path: Path) -> None:
    config.data.train = [schema.BlendPart(write_pair(tmp_path / "neg", [[3, -1, 1] * 50] * 9, np.int32))]
    assert "token 1 is -1" in text(check_data(config))


def test_the_check_imports_no_torch() -> None:
    heavy = ("torch", "megatron", "deepspeed", "wandb")
    code = f"import sys, pretrain.preflight.data; sys.exit(any(m in sys.modules for m in {heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[3])
