"""Raw batches -> texts, in the workers. In: a `DocumentBatch`. Out: its texts in order, and all of its problems.

Torch-free.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate

from configs.errors import Problem
from tools.data.read.corpus import DocumentBatch, not_utf8

MOST_LEVELS = 500
"""Far below Python's limit of recursion, which depends on the calls before: every process must take the same lines."""
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def texts_of(batch: DocumentBatch, text_key: str) -> tuple[list[str], list[Problem]]:
    """(texts, problems) of a batch.

    Empty documents are left out. UTF-8 is checked. A byte order mark at the start of a file is dropped.
    """
    return _from_lines(batch, text_key) if batch.lines else _from_documents(batch)


def _from_documents(batch: DocumentBatch) -> tuple[list[str], list[Problem]]:
    texts: list[str] = []
    problems: list[Problem] = []
    for name, offset, raw in batch.documents:
        if raw is None:
            problems.append(Problem("--corpus", name, "every row must have a text, this one is null", "leave such rows out"))
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append(not_utf8(name, offset, error))
            continue
        if batch.is_text_file and "\0" in text:
            rule = f"a text file has no zero bytes, byte {offset + raw.index(0)} is one: is it UTF-16, or no text?"
            problems.append(Problem("--corpus", name, rule, "convert it, e.g.: iconv -f UTF-16LE -t UTF-8"))
            continue
        if offset == 0:
            text = text.removeprefix("\ufeff")
        if text:
            texts.append(text)
    return texts, problems


def _from_lines(batch: DocumentBatch, text_key: str) -> tuple[list[str], list[Problem]]:
    texts: list[str] = []
    problems: list[Problem] = []
    offset = batch.first_offset_bytes
    for number, raw in enumerate(batch.lines.split(b"\n"), batch.first_line):
        if raw.strip():
            text = _from_line(raw, f"{batch.source}:{number}", offset, text_key)
            if isinstance(text, Problem):
                problems.append(text)
            elif text:
                texts.append(text)
        offset += len(raw) + 1
    return texts, problems


def _from_line(raw: bytes, place: str, offset_bytes: int, text_key: str) -> str | Problem:
    """The text of one JSON line, or its problem."""
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(place, offset_bytes, error)
    if offset_bytes == 0:
        line = line.removeprefix("\ufeff")
    try:
        item = json.loads(line)
        if (levels := _levels(line)) > MOST_LEVELS:
            return Problem("--corpus", place, f"JSON may be nested {MOST_LEVELS} levels deep, this is {levels}", "mend the line")
    except (ValueError, RecursionError) as error:
        return Problem("--corpus", place, f"each line must be one JSON object: {error}", "mend the line")
    if not isinstance(item, dict):
        return Problem("--corpus", place, f"each line must be a JSON object, this is {type(item).__name__}", "mend the line")
    if text_key not in item:
        names = ", ".join(map(str, list(item)[:10])) or "none"
        rule = f"each line must have the key {text_key!r}; this one has: {names}"
        return Problem("--corpus", place, rule, "name the key with --text-key, or mend the line")
    text = item[text_key]
    if not isinstance(text, str):
        rule = f"the value of {text_key!r} must be a text, this is {type(text).__name__}"
        return Problem("--corpus", place, rule, "mend the line")
    if "\\u" in line and not _is_encodable(text):
        return Problem("--corpus", place, "half of a surrogate pair (\\ud800 to \\udfff) is no character", "mend the line")
    return text


def _levels(line: str) -> int:
    """How deeply a JSON line is nested, as far as it may exceed MOST_LEVELS."""
    if line.count("[") + line.count("{") <= MOST_LEVELS:
        return 0
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", STRING.sub("", line)))
    return max(accumulate(steps), default=0)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
