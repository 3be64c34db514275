"""The names given by --corpus -> the files to read, in order, and everything in the folders that is left out, with the reason.

In: `embedded`, files and folders. Out: a `Corpus`. A file is read once, under the first name that leads to it. Folders behind
links are followed. What can't be read is refused. What is no corpus (hidden files, tokenizers, token files, run folders, other
kinds of files) is listed.

Torch-free.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import ConfigError, Problem
from pretrain.data.indexed import bin_path, file_problem, idx_path
from pretrain.run.folder import RunFolder
from tools.data.read import embedded_corpus

FORMS = {".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "array", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
NOT_TEXT = {
    ".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar", ".lz4", ".lzma", ".br", ".z", ".snappy", ".arrow", ".feather",
    ".avro", ".orc", ".bin", ".idx", ".model", ".safetensors", ".npy", ".pt",
}  # fmt: skip
"""Suffixes of archives, unread compressions and binary files. Any other file that is named itself is read as plain text."""
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
BESIDE_TOKENIZERS = {
    "vocab.json", "vocab.txt", "merges.txt", "config.json", "generation_config.json", "model.safetensors.index.json",
}  # fmt: skip
LARGEST_META_BYTES = 1 << 24

HIDDEN = "hidden (the name begins with a dot)"
OWN = "a tokenizer, token files or a run folder"
EMPTY = "empty"
TWICE = "the same file or folder as an earlier one"
OTHER = "no corpus by its suffix"
SPECIAL = "no regular file"
AROUND = "a link to a folder around the corpus"


def shown(path: str) -> str:
    """A path as text that every encoding of Unicode takes: undecodable bytes as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class CorpusSource:
    """One file, or the embedded corpus. `form`: embedded, text, blocks, lines, array or parquet. `compression`: a value of
    COMPRESSIONS, or "". `name` opens the file; `label` is for people and JSON.
    """

    name: str
    form: str
    compression: str
    size_bytes: int

    @property
    def label(self) -> str:
        return shown(self.name)


@dataclass(frozen=True)
class LeftOut:
    """Something in a folder, or named twice, that isn't read. `reason`: one of the constants above."""

    path: str
    reason: str


@dataclass
class Corpus:
    """What is read, in order, and what is left out."""

    sources: list[CorpusSource] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return [source.label for source in self.sources]

    def left_out_counts(self) -> dict[str, int]:
        """Reason -> number of files and folders."""
        reasons = [item.reason for item in self.left_out]
        return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}

    def left_out_summary(self) -> str:
        """One line that says how much was left out and why, with up to three paths a reason. Empty when all was taken."""
        parts = []
        for reason, count in self.left_out_counts().items():
            paths = [item.path for item in self.left_out if item.reason == reason][:3]
            names = ", ".join(path if path.isprintable() else repr(path) for path in paths)
            parts.append(f"{count:,} {reason}: {names}{', …' if count > len(paths) else ''}")
        return f"left out of the corpus: {'; '.join(parts)}" if parts else ""


def expand(names: Sequence[str], split_blank_lines: bool = False, tokenizer: str | None = None) -> Corpus:
    """The sources in the order named, the files of a folder in the order of their paths.

    `tokenizer`: a file that is no corpus wherever it lies. Raises ConfigError with everything that can't be read.
    """
    search = _Search(split_blank_lines, tokenizer)
    for name in names:
        search.add(name)
    if search.problems:
        raise ConfigError(search.problems)
    return search.corpus


class _Search:
    """One walk over all names. It remembers what was taken."""

    def __init__(self, split_blank_lines: bool, tokenizer: str | None) -> None:
        self.text_form = "blocks" if split_blank_lines else "text"
        self.tokenizer = os.path.realpath(tokenizer) if tokenizer else None
        self.corpus = Corpus()
        self.problems: list[Problem] = []
        self.taken: set[tuple[int, int] | str] = set()

    def add(self, name: str) -> None:
        path = Path(name)
        if name == "embedded":
            if self._is_new("embedded", name):
                size = sum(len(text) for _, text in embedded_corpus.documents())
                self.corpus.sources.append(CorpusSource(name, "embedded", "", size))
        elif "\0" in name or not os.path.lexists(path):
            self._refuse(name, "the file must exist", "name a file, a folder, or: embedded")
        elif path.is_dir():
            self._folder(name)
        else:
            self._named_file(name)

    def _folder(self, name: str) -> None:
        """Everything below a folder, in the order of the parts of the paths."""
        before = (len(self.corpus.sources), len(self.corpus.left_out), len(self.problems))
        waiting = [name]
        while waiting:
            path = waiting.pop()
            if path != name and os.path.basename(path).startswith("."):
                self._leave_out(path, HIDDEN)
                continue
            try:
                status = os.stat(path)
                if stat.S_ISDIR(status.st_mode):
                    if self._is_folder_to_read(path, name):
                        waiting += sorted((entry.path for entry in os.scandir(path)), reverse=True)
                else:
                    self._found_file(path, status)
            except OSError as error:
                fix = "make it readable, mend the link, or name only the files and folders to read"
                self._refuse(path, f"every file of a folder must be readable: {error.strerror or error}", fix)
        sources, left_out = self.corpus.sources[before[0] :], self.corpus.left_out[before[1] :]
        if not sources and len(self.problems) == before[2] and not any(item.reason == TWICE for item in left_out):
            endings = f"{', '.join(FORMS)}, alone or with {', '.join(COMPRESSIONS)}"
            found = Corpus(left_out=left_out).left_out_summary() or "it is empty"
            rule = f"a folder must hold files with text, which end in {endings}; {found}"
            self._refuse(name, rule, "name another folder, or the files themselves")

    def _is_folder_to_read(self, path: str, top: str) -> bool:
        if path != top and _is_around(os.path.realpath(path), os.path.realpath(top)):
            self._leave_out(path, AROUND)
            return False
        run = RunFolder(Path(path))
        if run.events.is_file() and run.config.is_file():
            self._leave_out(path, OWN)
            return False
        return self._is_new(os.path.realpath(path), path)

    def _found_file(self, path: str, status: os.stat_result) -> None:
        """A file of a folder: read, left out, or refused."""
        suffix, compression = suffixes(path)
        if not stat.S_ISREG(status.st_mode):
            self._leave_out(path, SPECIAL)
        elif self._is_own(path):
            self._leave_out(path, OWN)
        elif suffix not in FORMS:
            self._leave_out(path, OTHER)
        elif not status.st_size:
            self._leave_out(path, EMPTY)
        elif self._is_new(_identity(path, status), path):
            self._read(path, suffix, compression, status.st_size)

    def _named_file(self, name: str) -> None:
        """A file that the user names is read as it is, or refused."""
        suffix, compression = suffixes(name)
        try:
            status = os.stat(name)
        except OSError as error:
            self.problems.append(file_problem(error, name, "--corpus"))
            return
        if not stat.S_ISREG(status.st_mode):
            self._refuse(name, "must be a regular file or a folder", "write the text to a file first")
        elif not status.st_size:
            self._refuse(name, "the file must not be empty", "leave it out, or name another")
        elif self._is_own(name):
            self._refuse(name, "a corpus is text; this is a tokenizer or what belongs to token files", "leave it out")
        elif suffix in NOT_TEXT:
            rule = f"{suffix} files are no text; a corpus is of {', '.join(FORMS)}, alone or with {', '.join(COMPRESSIONS)}"
            self._refuse(name, rule, "unpack or convert it, or rename it if it is plain text")
        elif self._is_new(_identity(name, status), name):
            self._read(name, suffix, compression, status.st_size)

    def _read(self, path: str, suffix: str, compression: str, size_bytes: int) -> None:
        form = FORMS.get(suffix, "text")
        if not os.access(path, os.R_OK, effective_ids=True):
            self._refuse(path, "the file must be readable: Permission denied", "make it readable, or leave it out")
        elif form == "parquet" and compression:
            self._refuse(path, "Parquet compresses its own pages and is read only as it is", "decompress the file first")
        else:
            form = self.text_form if form == "text" else form
            self.corpus.sources.append(CorpusSource(path, form, compression, size_bytes))

    def _is_own(self, path: str) -> bool:
        """Whether it is a tokenizer's file or the .meta.json of token files."""
        folder, name = os.path.split(path)
        if name in TOKENIZER_FILES or (self.tokenizer and os.path.realpath(path) == self.tokenizer):
            return True
        if name in BESIDE_TOKENIZERS:
            return any(os.path.exists(os.path.join(folder, other)) for other in TOKENIZER_FILES)
        prefix = path.removesuffix(".meta.json")
        return prefix != path and (bin_path(prefix).exists() or idx_path(prefix).exists() or _is_meta(path))

    def _is_new(self, identity: tuple[int, int] | str, path: str) -> bool:
        if identity in self.taken:
            self._leave_out(path, TWICE)
            return False
        self.taken.add(identity)
        return True

    def _leave_out(self, path: str, reason: str) -> None:
        self.corpus.left_out.append(LeftOut(shown(path), reason))

    def _refuse(self, path: str, rule: str, fix: str) -> None:
        self.problems.append(Problem("--corpus", path, rule, fix))


def suffixes(path: str) -> tuple[str, str]:
    """(suffix of the form, kind of compression): A.JSONL.GZ -> .jsonl, gzip"""
    stem, last = os.path.splitext(os.path.basename(path))
    if last.lower() in COMPRESSIONS:
        return os.path.splitext(stem)[1].lower(), COMPRESSIONS[last.lower()]
    return last.lower(), ""


def _is_around(folder: str, inner: str) -> bool:
    return os.path.commonpath([folder, inner]) == folder


def _identity(path: str, status: os.stat_result) -> tuple[int, int] | str:
    """Equal for two names of one file. Inode numbers are asked only of hard links: some network file systems invent them."""
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 and status.st_ino else os.path.realpath(path)


def _is_meta(path: str) -> bool:
    """Whether a .meta.json is what tokenize wrote, with the token files gone."""
    try:
        if os.path.getsize(path) > LARGEST_META_BYTES:
            return False
        meta = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and isinstance(meta.get("tokenizer"), dict) and "unigram_entropy_nats" in meta
