"""events.jsonl: several writers, one line each, whatever a crash of one of them left."""

from __future__ import annotations

import ast
import fcntl
import os
import re
import resource
from multiprocessing import get_context
from pathlib import Path

import pytest

from pretrain.run import event_log
from pretrain.run.event_log import append_event, mend_events
from pretrain.run.event_rows import read_events
from pretrain.run.events import COMMON_FIELDS, EVENTS, EventKind, check_event, markdown
from pretrain.run.files import iterate_lines
from pretrain.run.folder import RunFolder


def _write(path: str, writer: int) -> None:
    for number in range(50):
        append_event(RunFolder(Path(path)), writer, EventKind.EVENTS_MENDED, cut_bytes=number)
        if number % 10 == writer:
            # A crash of somebody in the middle of a line.
            with open(Path(path) / "events.jsonl", "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(b'{"torn": ')


def test_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = get_context("fork")
    writers = [context.Process(target=_write, args=(str(tmp_path), writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    mend_events(RunFolder(tmp_path))
    rows = [row for _, row in iterate_lines(tmp_path / "events.jsonl")]
    assert None not in rows
    for writer in range(4):
        assert [row["cut_bytes"] for row in rows if row and row["attempt"] == writer] == list(range(50))


def test_a_line_that_lacks_room_for_its_last_byte_leaves_nothing(tmp_path: Path) -> None:
    """Its newline: what stands there would be a whole event, and the writer tries again."""
    folder, before = RunFolder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for attempt in (1, 2):
        append_event(folder, attempt, EventKind.TRAINING, 7.0, step=1)
    size = folder.events.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2 - 1, before[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            append_event(folder, 3, EventKind.TRAINING, 7.0, step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    append_event(folder, 3, EventKind.TRAINING, 7.0, step=1)
    assert [row["attempt"] for row in read_events(folder)] == [1, 2, 3]


def test_a_stopped_holder_of_the_lock_does_not_stop_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "PATIENCE_S", 0.1)
    folder = RunFolder(tmp_path)
    held = os.open(folder.events, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    append_event(folder, 1, EventKind.HUNG, why="x" * 200, late=[], nodes=[])
    os.close(held)
    assert [row["kind"] for _, row in iterate_lines(folder.events) if row] == ["hung"]


def test_every_kind_has_its_fields_and_its_writer_in_the_table() -> None:
    assert list(EVENTS) == list(EventKind), "the table is complete and in the order of the enum"
    text = markdown()
    for kind, spec in EVENTS.items():
        names = [field.name for field in spec.fields]
        assert len(set(names)) == len(names) and not {field.name for field in COMMON_FIELDS} & set(names), kind
        section = text.partition(f"### `{kind}`\n")[2].partition("### ")[0]
        assert spec.meaning in section and spec.writer in section
        assert all(f"| `{field.name}`" in section and field.type in section for field in spec.fields), kind


def test_an_unknown_kind_or_field_is_our_own_bug(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(AssertionError, match=r"event pruned has no fields \['folders'\]; its fields are \['folder'\]"):
        append_event(folder, 1, EventKind.PRUNED, folder="step_0000001", folders=[])
    with pytest.raises(AssertionError, match=r"event pruned lacks the fields \['folder'\]"):
        append_event(folder, 1, EventKind.PRUNED)
    with pytest.raises(AssertionError, match="'pruned' is not an EventKind"):
        append_event(folder, 1, "pruned", folder="step_0000001")  # pyright: ignore[reportArgumentType]
    assert not folder.events.exists(), "nothing is written before the check"
    check_event(EventKind.RECORD_GAP, {"after_step": 1, "next_step": 3})


# "outcome" and the like are words of other contracts too; these kinds are not.
_NAMES_OF_EVENTS_ONLY = {str(kind) for kind in EventKind if "_" in kind} - {"rolled_back"}


def test_no_source_file_writes_a_kind_as_a_literal() -> None:
    """A kind is an `EventKind` wherever it is written or read; only the table spells it out."""
    root, kinds, found = Path(__file__).resolve().parents[3], {str(kind) for kind in EventKind}, []
    for folder in ("configs", "parallel", "pretrain", "launch", "tools"):
        for path in sorted((root / folder).rglob("*.py")):
            if path == root / "pretrain/run/events.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if any(text in (kinds if is_event else _NAMES_OF_EVENTS_ONLY) for is_event, text in _literals(node)):
                    found.append(f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}")
    assert not found, found


def _literals(node: ast.AST) -> list[tuple[bool, str]]:
    """(is it compared with a row's kind or given to a writer of events, the text) of the strings in one node."""
    if isinstance(node, ast.Compare) and re.search(r"\['kind'\]|get\('kind'|\bkind\b (==|!=|in|not)", ast.unparse(node)):
        return [(True, text) for text in _texts(node)]
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2].lstrip("_") in WRITERS:
        return [(True, arg.value) for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return [(False, node.value)] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def _texts(node: ast.AST) -> list[str]:
    return [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]


WRITERS = {"append_event", "event", "write_event", "announce"}
