"""The run folder: one live attempt, numbers that only rise, files whole or absent, refusals that change nothing."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import ConfigError, Problem
from pretrain.run import files
from pretrain.run import folder as run_folder
from pretrain.run.attempt import Attempt, open_attempt
from pretrain.run.files import (
    append_line,
    iterate_lines,
    iterate_parts,
    last_row,
    lines_from_end,
    mend_torn_line,
    write_atomically,
    write_named_file,
)
from pretrain.run.folder import NAMES, Outcome, RunFolder, check_run_folder
from pretrain.run.lock import LockHolder, acquire, holder_text, live_holder
from pretrain.run.provenance import make_provenance

HOLD = """
import sys, time
from pathlib import Path
from pretrain.run.folder import RunFolder
from pretrain.run.attempt import open_attempt
attempt = open_attempt(RunFolder(Path(sys.argv[1])), "run: {}\\n", {}, {})
print(attempt.number, flush=True)
time.sleep(60)
"""


def begin(folder: RunFolder, environ: dict[str, str] | None = None, text: str = "run: {}\n") -> Attempt:
    return open_attempt(folder, text, {"origin": {}}, environ or {})


def events(folder: RunFolder) -> list[dict[str, object]]:
    return [row for _, row in iterate_lines(folder.events) if row is not None]


def problem_of(error: pytest.ExceptionInfo[ConfigError]) -> Problem:
    (problem,) = error.value.problems
    return problem


def test_attempts_count_up_and_keep_their_configs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    with begin(folder, text="first\n") as attempt:
        assert attempt.number == 1
        wandb_id = attempt.wandb_id
        attempt.finish(Outcome(1, "stopped", "a person asked", 5, 40))
    with begin(folder, text="second\n") as attempt:
        assert (attempt.number, attempt.wandb_id) == (2, wandb_id)
    assert folder.config.read_text() == "second\n"
    assert [(folder.launch_dir(n) / "config.yaml").read_text() for n in (1, 2)] == ["first\n", "second\n"]
    assert [(row["attempt"], row["kind"]) for row in events(folder)] == [(1, "attempt"), (1, "outcome"), (2, "attempt")]


def test_outcome_and_done(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    with begin(folder) as attempt:
        attempt.finish(Outcome(1, "finished", "all steps done", 10, 80, time=1.5))
    assert json.loads(folder.outcome.read_text()) == {
        "attempt": 1,
        "state": "finished",
        "why": "all steps done",
        "step": 10,
        "consumed_samples": 80,
        "time": 1.5,
    }
    assert folder.done.exists()
    with begin(folder) as attempt:
        assert not folder.done.exists(), "a run that goes on isn't done"
        attempt.finish(Outcome(2, "preempted", "SIGTERM", 12, 96))
    assert not folder.done.exists() and folder.read_outcome() == Outcome(2, "preempted", "SIGTERM", 12, 96, _time(folder))


def test_a_second_live_attempt_is_refused_by_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    with begin(folder), pytest.raises(ConfigError) as error:
        acquire(folder, patience_s=0.0)
    problem = problem_of(error)
    assert problem.path == "run.dir" and f"held by attempt 1, process {os.getpid()} on" in problem.rule
    assert f"rm {folder.lock}" in problem.fix
    assert live_holder(folder) is None


def test_the_lock_ends_with_its_killed_holder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    holder = live_holder(folder)
    assert holder is not None and holder.pid == process.pid
    process.kill()
    process.communicate()
    assert live_holder(folder) is None
    with begin(folder) as attempt:
        assert attempt.number == 2
    assert [row["kind"] for row in events(folder)] == ["attempt", "attempt", "no_outcome"]


def test_a_lock_of_another_host_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    """flock may not reach across hosts: a lock that moves is alive, one that stands still is taken over."""
    folder = RunFolder(tmp_path)
    folder.lock.write_bytes(holder_text(LockHolder("elsewhere", 7, 3, 1)))
    acquire(folder, silence_s=0.2).release()
    folder.lock.write_bytes(holder_text(LockHolder("elsewhere", 7, 3, 1)))
    mover = "import os, sys, time\nfor _ in range(100): time.sleep(0.05); os.utime(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", mover, str(folder.lock)])
    with pytest.raises(ConfigError, match="attempt 3, process 7 on elsewhere"):
        acquire(folder, silence_s=4.0)
    process.kill()
    process.wait()
    folder.lock.write_bytes(holder_text(LockHolder("elsewhere", 7, 3, 1, released=True)))
    acquire(folder, silence_s=60.0).release()


def test_a_removed_lock_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    with begin(folder) as attempt:
        attempt.check_held()
        folder.lock.unlink()
        with pytest.raises(ConfigError, match="must hold its run folder"):
            attempt.check_held()


def test_a_launchers_claim_is_adopted_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    folder.launch_dir(1).mkdir(parents=True)
    with begin(folder, {"PHALANX_ATTEMPT": "1"}) as attempt:
        assert attempt.number == 1
    with begin(folder, {"PHALANX_ATTEMPT": "1"}) as attempt:
        assert attempt.number == 2, "a claim that is used up isn't adopted again"
    folder.launch_dir(3).mkdir()
    with begin(folder) as attempt:
        assert attempt.number == 4, "torchrun by hand leaves a launcher's claim alone"


def test_foreign_folder_and_file_are_refused_unchanged(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("…")
    with pytest.raises(ConfigError) as error:
        begin(RunFolder(foreign))
    assert "holds chapter.tex" in problem_of(error).rule
    assert os.listdir(foreign) == ["chapter.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="it is a file"):
        begin(RunFolder(tmp_path / "file"))
    with pytest.raises(ConfigError, match="every part of the path above must be a folder"):
        begin(RunFolder(tmp_path / "file" / "run"))
    assert check_run_folder(RunFolder(tmp_path / "new")) == []


def test_unwritable_folder_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        begin(RunFolder(Path("/proc/phalanx")))
    assert problem_of(error).path == "run.dir"


def test_full_disk_is_a_problem_and_keeps_the_old_files(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the same failing write."""
    folder = RunFolder(tmp_path / "a")
    begin(folder, text="first\n").close()
    code = """
import resource, signal, sys
from pathlib import Path
from configs.errors import ConfigError
from pretrain.run.folder import RunFolder
from pretrain.run.attempt import open_attempt
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    open_attempt(RunFolder(Path(sys.argv[1])), "x" * 10000, {}, {})
except ConfigError as error:
    print(error)
    sys.exit(2)
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "file size limit must leave room" in done.stdout
    assert folder.config.read_text() == "first\n"
    assert [path for path in folder.path.rglob("*.tmp")] == []
    with begin(folder) as attempt:
        assert attempt.number >= 2


def test_a_refused_resume_changes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    begin(folder, text="model: one\n").close()
    seen = []

    def refuse(before: str | None) -> list[Problem]:
        seen.append(before)
        return [Problem("model", "two", "a run keeps its model", "choose another run.dir")]

    with pytest.raises(ConfigError, match="a run keeps its model"):
        open_attempt(folder, "model: two\n", {}, {}, refuse)
    assert seen == ["model: one\n"] and folder.config.read_text() == "model: one\n"
    assert folder.claimed_attempts() == [1] and live_holder(folder) is None


def test_a_torn_event_is_mended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a")
    begin(folder).close()
    with open(folder.events, "a") as file:
        file.write('{"time": 1.0, "kind": "sa')
    begin(folder).close()
    assert [row["kind"] for row in events(folder)] == ["attempt", "attempt", "events_mended", "no_outcome"]


def test_mending_keeps_a_whole_object_without_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert mend_torn_line(path) == 0 and last_row(path) == {"a": 2}
    path.write_bytes(b'{"a": 1}\n' + b"x" * 100_000)
    assert mend_torn_line(path) == 100_000 and path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b"torn")
    assert mend_torn_line(path) == 4 and path.read_bytes() == b""
    assert mend_torn_line(tmp_path / "absent") == 0


def test_files_are_read_in_parts_and_from_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    for size in (1, 2, 5, 8, 64):
        monkeypatch.setattr(files, "_PART_BYTES", size)
        for text in (b"", b"\n", b"a", b"a\n", b"\na", b"first\n\nthird line\n", b"first\nsecond\nto", b"\n\n\n"):
            path.write_bytes(text)
            lines = text.split(b"\n")[:-1]
            assert list(lines_from_end(path)) == lines[::-1], (size, text)
            assert b"".join(iterate_parts(path)) == b"".join(line + b"\n" for line in lines), (size, text)
    monkeypatch.setattr(files, "_LINE_BYTES", 10)
    path.write_bytes(b"first\n" + b"x" * 1000 + b"\nlast\n")
    monkeypatch.setattr(files, "_PART_BYTES", 4)
    assert list(iterate_parts(path)) == [b"first\n", b"last\n"]
    assert next(lines_from_end(path)) == b"last" and max(map(len, lines_from_end(path))) < 20


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("old")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "absent" / "kept", "new")
    write_atomically(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "new" and os.listdir(tmp_path) == ["kept"]


def test_a_named_file_replaces_nothing_but_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("old")
    (tmp_path / "link").symlink_to("page")
    write_named_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "page").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_named_file(tmp_path / "pipe", b"page")
    assert os.read(reader, 10) == b"page" and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    os.close(reader)
    with pytest.raises(IsADirectoryError):
        write_named_file("/", b"page")


def test_append_refuses_what_is_not_json(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with pytest.raises(ValueError):
        append_line(descriptor, {"loss": float("nan")})
    os.close(descriptor)
    assert (tmp_path / "lines").read_bytes() == b""


def test_provenance_names_code_and_packages() -> None:
    provenance = make_provenance({"run.seed": "command line"})
    assert provenance["origin"] == {"run.seed": "command line"}
    assert provenance["packages"]["torch"] and provenance["code_version"]
    assert provenance["packages"]["transformer-engine"] is None or isinstance(provenance["packages"]["transformer-engine"], str)
    json.dumps(provenance)


def _time(folder: RunFolder) -> float:
    outcome = folder.read_outcome()
    assert outcome is not None
    assert abs(outcome.time - time.time()) < 60
    return outcome.time


def test_every_path_in_a_run_folder_is_in_the_contract() -> None:
    """The paths of `RunFolder`, and the literals that our sources join to a run folder's path."""
    folder, found = RunFolder(Path("run")), set[str]()
    for name in dir(RunFolder):
        value = getattr(folder, name) if not name.startswith("_") and isinstance(getattr(RunFolder, name), property) else None
        if isinstance(value, Path):
            found.add(value.relative_to(folder.path).parts[0])
    found |= {folder.launch_dir(1).parts[1], folder.log_dir(1).parts[1]}
    root = Path(__file__).resolve().parents[3]
    for part in ("pretrain", "launch", "tools"):
        for path in (root / part).rglob("*.py"):
            found |= set(re.findall(r"folder\.path / f?\"([^\"/{]+)", path.read_text(encoding="utf-8")))
    assert found <= NAMES and {"profile", "launch", "logs", "lock"} <= found
    contract = run_folder.__doc__ or ""
    assert all(re.search(rf"^    {re.escape(name)}/? ", contract, re.M) for name in NAMES), "the docstring says what each one is"
