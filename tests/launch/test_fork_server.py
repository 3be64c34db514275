"""Ranks that are forked from one process behave as ranks that are Pythons of their own do: real torchrun, small programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import Config
from launch.plan import make_plan, program_path
from launch.watch.failures import find_failures
from pretrain.run.process import IMPORTS_ONLY

ROOT = Path(__file__).resolve().parents[2]
# What the agent sets for each rank, after the libraries have been imported.
OF_A_RANK = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)  # fmt: skip
PREPARED = (
    "import os, signal, sys, time\nfrom pretrain.rank.process_setup import prepare\nif __name__ == '__main__':\n  prepare()\n"
)


def run_ranks(folder: Path, program: str, *words: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """torchrun on a program's text, its logs in `folder`/logs, as the local launcher starts it."""
    (folder / "program.py").write_text(program)
    config = Config()
    config.launch.processes_per_node = ranks
    plan = make_plan(config, "", (), {}, program=str(folder / "program.py"))
    command = replace(plan, arguments=words).argv
    logs = folder / "logs"
    logs.mkdir()
    env = {**os.environ, **dict(plan.env), "PHALANX_LOG_DIR": str(logs)}
    with open(logs / "torchrun.log", "w") as log:
        return subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=120, text=True)


def test_a_rank_is_like_a_python_of_its_own(tmp_path: Path) -> None:
    """Its arguments, environment, streams, names and functions at exit; one process has imported for all."""
    program = f"""{PREPARED}
import atexit, json
from pathlib import Path
os.environ.setdefault("IMPORTED_IN", str(os.getpid()))
if __name__ == "__main__":
    atexit.register(lambda: Path(f"ended_{{os.environ['RANK']}}").touch())
    sys.stdout.write("unfinished line")
    names = [Path(f"/proc/{{pid}}/comm").read_text().strip() for pid in (os.getpid(), os.getppid())]
    ignored = [number.name for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) == signal.SIG_IGN]
    facts = [sys.argv[1:], os.environ["LOCAL_RANK"], names, ignored, os.environ["IMPORTED_IN"], os.getcwd()]
    Path(f"facts_{{os.environ['RANK']}}").write_text(json.dumps(facts))
    sys.exit(0)
"""
    assert run_ranks(tmp_path, program, "--config", "a b", "x=[1]").returncode == 0, (tmp_path / "logs/torchrun.log").read_text()
    found = [json.loads((tmp_path / f"facts_{rank}").read_text()) for rank in (0, 1)]
    imported_in = found[0][4]
    for rank in (0, 1):
        names = [f"rank {rank}", "fork server"]
        assert found[rank] == [["--config", "a b", "x=[1]"], str(rank), names, [], imported_in, str(tmp_path)]
        assert (tmp_path / f"ended_{rank}").exists()
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_0.log", "rank_1.log", "torchrun.log"]
    assert (tmp_path / "logs/rank_1.log").read_text() == "unfinished line"


def test_all_failed_ranks_are_reported(tmp_path: Path) -> None:
    """Rank 1 is killed and rank 0 loses it before the agent looks again; rank 2 obeys SIGTERM and ends well."""
    program = f"""{PREPARED}
def status(pid):
    return open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()
def is_dead(rank):
    pid = open(f"pid_{{rank}}").read()
    return not os.path.exists(f"/proc/{{pid}}") or status(pid)[0] == "Z"
if __name__ == "__main__":
    rank, agent = os.environ["RANK"], int(status(os.getppid())[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with open(f"new_{{rank}}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"new_{{rank}}", f"pid_{{rank}}")
    while not all(os.path.exists(f"pid_{{other}}") for other in "012"):
        time.sleep(0.01)
    if rank == "1":
        os.kill(agent, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)
    while not all(map(is_dead, "1" if rank == "0" else "01")):
        time.sleep(0.01)
    if rank == "0":
        sys.exit(75)
    os.kill(agent, signal.SIGCONT)
    time.sleep(100)
"""
    assert run_ranks(tmp_path, program, ranks=3).returncode == 1
    log = (tmp_path / "logs/torchrun.log").read_text()
    assert "exitcode  : -9 " in log and "exitcode  : 75 " in log and "rank      : 2 " not in log
    assert "failed (exitcode: " in log and "ProcessExitedException" not in log, "torch logs a traceback of its own"
    assert [(failure.rank, failure.kind) for failure in find_failures(tmp_path / "logs")] == [(1, "killed")]


def test_a_failing_import_is_in_the_ranks_log(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, f"{PREPARED}\nimport no_such_module", ranks=1).returncode == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in (tmp_path / "logs/rank_0.log").read_text()
    log = (tmp_path / "logs/torchrun.log").read_text()
    assert "the ranks repeat an import that failed: ModuleNotFoundError" in log and "exitcode  : 1 " in log


@pytest.mark.parametrize(("code", "is_forked"), [(0, False), (3, True)])
def test_ranks_are_not_forked_after_cuda_was_initialized(tmp_path: Path, code: int, is_forked: bool) -> None:
    """A driver library that says whether it has been initialized (3: no), loaded by an import."""
    source = f"int cuDeviceGetCount(int *count) {{ *count = 1; return {code}; }}"
    library = tmp_path / "libcuda.so.1"
    words = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run(["cc", *words, "-x", "c", "-"], input=source, text=True, check=True)
    load = f"import ctypes\nctypes.CDLL({str(library)!r})"
    program = f"{PREPARED}\n{load}\nprint(open('/proc/self/cmdline').read().split(chr(0))[1])"
    assert run_ranks(tmp_path, program, ranks=1).returncode == 0
    # The options of the Python that runs the rank: its own, or those of torchrun's process.
    assert (tmp_path / "logs/rank_0.log").read_text() == ("-P\n" if is_forked else "-u\n")
    reason = "each rank imports its libraries itself: an import has initialized CUDA"
    assert (reason in (tmp_path / "logs/torchrun.log").read_text()) != is_forked


def test_a_thread_of_an_import_is_a_reason_too(tmp_path: Path) -> None:
    program = f"{PREPARED}\nimport threading\nthreading.Thread(target=time.sleep, args=(1,), name='busy', daemon=True).start()"
    assert run_ranks(tmp_path, program, ranks=1).returncode == 0
    assert "itself: an import has started the thread busy" in (tmp_path / "logs/torchrun.log").read_text()


IMPORT = """
import os, runpy, sys
names, found = sys.argv[1].split(","), set()
read = os._Environ.__getitem__

def recorded(environ, name):
    frame = sys._getframe(1)
    while frame.f_code.co_filename.endswith(("os.py>", "<frozen os>", "/os.py", "_collections_abc.py", "_collections_abc>")):
        frame = frame.f_back
    if name in names and not frame.f_code.co_filename.endswith("pretrain/run/heartbeat.py"):
        found.add(f"{frame.f_code.co_filename}:{frame.f_lineno} reads {name}")
    return read(environ, name)

os._Environ.__getitem__ = recorded
program, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_path(program, run_name=sys.argv.pop(1))
assert "torch._dynamo" in sys.modules and "deepspeed" in sys.modules
assert not found, sorted(found)
"""


def test_no_import_reads_what_a_rank_finds_only_later() -> None:
    """The Heartbeat of pretrain/main.py does, and is made again in every rank."""
    words = [",".join(OF_A_RANK), program_path(), IMPORTS_ONLY, "--config", "quickstart", "zero.engine=deepspeed", "zero.stage=2"]
    command = [sys.executable, "-P", "-c", IMPORT, *words]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
