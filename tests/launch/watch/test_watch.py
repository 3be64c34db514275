"""The laws of the watchdog: torn beats are seen, a hang is when nobody moves, and the late one is named."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Config
from launch.local.scratch import scratch_folder
from launch.watch.gathered_logs import GatheredLogs
from launch.watch.heartbeats import (
    MISSING,
    HeartbeatReader,
    NodeReport,
    RankState,
    ReportReader,
    WatchPolicy,
    hung,
    make_watch_policy,
    read_reports,
    timeout_s,
    write_report,
)
from launch.watch.processes import catches, children_of, state_of
from launch.watch.stacks import collect_stacks, main_frames, waits_in
from launch.watch.triage import combine, find_late, stragglers
from pretrain.run.beat import AGREEING, COMPUTING, ENDING, RECORDING, SAVING, WAITING, Beat, beat_path, decode, encode, stack_path
from pretrain.run.heartbeat import Heartbeat

ALL_REDUCE = ("all_reduce (torch/distributed/distributed_c10d.py:3012)", "wrapper (torch/distributed/c10d_logger.py:83)")
PRODUCT = ("forward (torch/nn/modules/linear.py:125)", "forward (megatron/core/distributed/data_parallel_base.py:22)")


def policy(**launch_watch: Any) -> WatchPolicy:
    config = Config()
    config.launch.processes_per_node = 4
    for name, value in launch_watch.items():
        setattr(config.launch.watch, name, value)
    return make_watch_policy(config)


def state(rank: int, **changes: Any) -> RankState:
    """A rank of two nodes that waits for the others of step 12 for 400 s."""
    waiting = RankState(rank, f"node{rank // 2}", 100 + rank, COMPUTING, 12, 400.0, 1.0, 0.01, 0.001, frames=ALL_REDUCE)
    return replace(waiting, **changes)


def report(host: str, *ranks: RankState, **changes: Any) -> NodeReport:
    return replace(NodeReport(host, 1.0, 1, None, True, ranks), **changes)


# Beats.

BEATS = st.builds(
    Beat,
    rank=st.integers(0, 10**6),
    pid=st.integers(1, 1 << 22),
    start_ticks=st.integers(0, 1 << 60),
    phase=st.sampled_from([WAITING, COMPUTING, SAVING]),
    step=st.integers(0, 10**9),
    since_s=st.floats(0, 1e9),
    step_time_s=st.none() | st.floats(0, 1e6),
    batch_wait_s=st.none() | st.floats(0, 1e6),
    probe_s=st.none() | st.floats(0, 1e3),
)


@given(BEATS, BEATS, st.integers(0, 512))
@settings(deadline=None)
def test_a_beat_is_read_whole_or_not_at_all(old: Beat, new: Beat, torn_at: int) -> None:
    before, after = encode(old), encode(new)
    assert decode(before) == old
    assert decode(after[:torn_at] + before[torn_at:]) in (old, new, None)
    assert decode(before[:torn_at]) == (old if torn_at == 512 else None)


def test_a_heartbeat_tells_the_phase_and_measures_steps(tmp_path: Path) -> None:
    now = [100.0]
    beat = Heartbeat({"RANK": "3", "PHALANX_BEAT_DIR": str(tmp_path)}, clock=lambda: now[0])
    beat.start()
    assert beat.describe() == "starting"
    for step in range(1, 4):
        for phase, seconds in ((WAITING, 0.5), (COMPUTING, 2.0), (AGREEING, 0.25), (RECORDING, 0.25), (SAVING, 60.0)):
            beat.enter(phase, step)
            now[0] += seconds
    beat.probed(0.002)
    beat.enter(WAITING, 4)
    read = decode(beat_path(tmp_path, 3).read_bytes())
    assert read is not None and (read.rank, read.pid, read.phase, read.step, read.since_s) == (3, os.getpid(), WAITING, 4, now[0])
    assert (read.step_time_s, read.batch_wait_s, read.probe_s) == (3.0, 0.5, 0.002), "a save isn't part of a step"
    assert beat.describe() == "step 4, waiting for data"


def test_without_a_folder_nothing_is_written() -> None:
    beat = Heartbeat({})
    beat.start()
    beat.enter(COMPUTING, 7)
    assert beat.describe() == "step 7, forward and backward"


# What is a hang.


def test_how_long_a_phase_may_last() -> None:
    assert timeout_s(state(0, step_time_s=1.0), policy()) == 300.0
    assert timeout_s(state(0, step_time_s=60.0), policy()) == 1200.0
    assert timeout_s(state(0, step_time_s=60.0), policy(step_timeout_s=40.0)) == 40.0
    assert timeout_s(state(0, step_time_s=None), policy(step_timeout_s=40.0)) == 1800.0, "the first step takes what it takes"
    assert timeout_s(state(0, phase=SAVING), policy(start_timeout_s=90.0)) == 90.0
    assert timeout_s(state(0), policy(step_timeout_s=0.0)) == timeout_s(state(0, phase=SAVING), policy(start_timeout_s=0.0))
    assert timeout_s(state(0), policy(step_timeout_s=0.0)) == float("inf")


def test_a_hang_is_when_those_furthest_behind_do_not_move() -> None:
    others = [state(0), state(1), state(2)]
    assert hung([*others, state(3, phase=WAITING)], policy())
    assert not hung([*others, state(3, age_s=1.0)], policy()), "one of the last moved"
    assert not hung([*others, state(3, phase=WAITING, age_s=1.0)], policy()), "the last one moved"
    assert not hung([*others, state(3, step=11, phase=SAVING)], policy()), "they wait for the last one's save, which may last"
    assert hung([*others, state(3, phase=SAVING, age_s=1.0)], policy()), "nobody waits for who is ahead"
    assert hung([*others, state(3, step=3, phase=WAITING, rollbacks=1, age_s=1.0)], policy()), "ahead, for it has rolled back"
    assert hung([*others, state(3, phase=ENDING, process="gone", age_s=1.0)], policy()), "who has ended doesn't count"
    assert not hung([], policy()) and not hung([state(3, phase=ENDING, process="gone")], policy())


def test_a_stopped_process_is_a_hang_in_any_phase() -> None:
    stopped = state(1, step=11, phase=SAVING, process="stopped", stuck_s=290.0)
    assert not hung([state(0), stopped], policy()) and hung([state(0), replace(stopped, stuck_s=310.0)], policy())
    assert not hung([state(0), replace(stopped, stuck_s=310.0)], policy(step_timeout_s=0.0))


def test_beats_of_a_folder(tmp_path: Path) -> None:
    now = [1000.0]
    watch = HeartbeatReader(tmp_path, policy(), "node0", clock=lambda: now[0])
    assert [s.rank for s in watch.look()] == [MISSING] * 4
    for rank in range(4):
        beat_path(tmp_path, rank).write_bytes(encode(Beat(rank, os.getpid(), 0, COMPUTING, 5, 1000.0)))
    now[0] = 1009.0
    assert [(s.rank, s.age_s, s.process) for s in watch.look()] == [(rank, 9.0, "alive") for rank in range(4)]
    beat_path(tmp_path, 2).write_bytes(b"torn")
    assert len(watch.look()) == 4, "the last whole beat counts"
    now[0] += 500.0
    assert watch.look()[0].age_s == 0.0, "machine or job were suspended: no rank could move, nor could the watchdog"
    gone = Beat(3, 2**22 + 1, 0, ENDING, 9, now[0])
    beat_path(tmp_path, 3).write_bytes(encode(gone))
    assert [s.has_ended for s in watch.look()] == [False, False, False, True]
    beat_path(tmp_path, 3).write_bytes(encode(replace(gone, phase=COMPUTING)))
    assert watch.look()[3].process == "gone" and not watch.look()[3].has_ended


def test_reports_are_read_back_and_silence_is_measured(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    written = report("a", state(0), failures=({"rank": 0, "time": 1.0, "kind": "killed", "text": "x"},))
    write_report(tmp_path, written)
    write_report(tmp_path, report("b", state(2)))
    (tmp_path / "nodes" / "c.json").write_text('{"ranks": []}')
    assert read_reports(tmp_path) == [written, report("b", state(2))]
    now = [0.0]
    reader = ReportReader(tmp_path, clock=lambda: now[0])
    reader.read()
    now[0] = 40.0
    write_report(tmp_path, report("b", state(2), time=2.0))
    assert [found.silent_s for found in reader.read()] == [40.0, 0.0]
    assert WatchPolicy.from_json(policy().to_json()) == policy()
    with pytest.raises(ValueError, match="a policy has exactly the keys"):
        WatchPolicy.from_json("{}")


# Who is late.


def test_a_process_that_cannot_move_is_late() -> None:
    found = find_late([state(0), state(1), state(2, process="stopped", frames=()), state(3)])
    assert found.line == (
        "hung: rank 2 on node1 is late: its process is stopped (SIGSTOP) in step 12, forward and backward, for 6:40"
    )
    assert found.nodes == ("node1",) and [s.rank for s in found.ranks] == [2]
    assert "3 others (rank 0, …): step 12, forward and backward, waiting in all_reduce" in found.text
    assert "rank 2 on node1 gives no stack" in found.text


def test_a_rank_behind_the_others_is_late() -> None:
    late = state(1, phase=WAITING, frames=("get (queue.py:171)",))
    found = find_late([state(0), late, state(2), state(3)])
    assert found.ranks == (late,) and "is behind the others: step 12, waiting for data, in get (queue.py:171)" in found.line
    older = state(3, step=11, phase=RECORDING, frames=("write (sinks.py:3)",))
    assert find_late([state(0), state(1), state(2), older]).ranks == (older,)


def test_among_ranks_of_one_phase_the_one_outside_of_collectives_is_late() -> None:
    busy = state(3, frames=PRODUCT)
    found = find_late([state(0), state(1), state(2), busy])
    assert found.ranks == (busy,) and "keeps the others waiting" in found.line and "linear.py:125" in found.line
    kernel = state(3, frames=(), process="uninterruptible", kernel="nfs_wait")
    assert "in the kernel (nfs_wait)" in find_late([state(0), state(1), state(2), kernel]).line


def test_when_nothing_tells_them_apart_nobody_is_blamed() -> None:
    found = find_late([state(rank) for rank in range(4)])
    assert found.ranks == () and found.nodes == ()
    assert found.line == (
        "hung: all 4 ranks wait in collectives in step 12, forward and backward, for 6:40: nothing tells who is late"
    )
    assert "all_reduce" in found.text


def test_nodes_are_combined() -> None:
    first, second = report("node0", state(0), state(1)), report("node1", state(2), state(3))
    saving = report("node1", state(2, step=11, phase=SAVING), hung=False)
    assert combine([first, saving], policy()) is None, "the first node waits for the second one's save"
    assert combine([first, replace(saving, silent_s=20.0, ranks=(state(2, age_s=290.0),))], policy()) is not None, "by now 310 s"
    assert combine([], policy()) is None
    assert combine([replace(first, exit_code=1), replace(second, exit_code=0)], policy()) is None
    stuck = replace(second, ranks=(state(2), state(3, process="stopped")))
    found = combine([first, stuck], policy())
    assert found is not None and [s.rank for s in found.ranks] == [3]
    silent = combine([first, replace(saving, silent_s=60.0)], policy())
    assert silent is not None and silent.nodes == ("node1",) and silent.line == "hung: no report from node1"


def test_stragglers_are_told_by_node() -> None:
    ranks = [state(rank) for rank in range(8)]
    assert stragglers([report("all", *ranks)], 1.5) == []
    slow = [replace(s, probe_s=0.002) if s.node == "node2" else s for s in ranks]
    (found,) = stragglers([report("all", *slow)], 1.5)
    assert (found.node, found.what, found.ratio, found.ranks) == ("node2", "speed probe", 2.0, (4, 5))
    assert "node2: speed probe takes 2.0 times the median of all ranks (rank 4, 5)" in str(found)
    waits = [replace(s, batch_wait_s=0.5) if s.rank == 1 else s for s in slow]
    assert [f.what for f in stragglers([report("all", *waits)], 1.5)] == ["waiting for data", "speed probe"]
    short = [replace(s, batch_wait_s=0.05) if s.rank == 1 else s for s in ranks]
    assert stragglers([report("all", *short)], 1.5) == [], "5% of a step slows nobody"
    assert stragglers([report("all", *waits)], None) == []
    assert stragglers([], 1.5) == []


# Stacks and processes.

FAULT = """Thread 0x00007f01 (most recent call first):
  File "/v/lib/python3.11/threading.py", line 331 in wait
  File "/v/lib/python3.11/threading.py", line 1002 in _bootstrap

Current thread 0x00007f02 (most recent call first):
  File "/v/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3012 in all_reduce
  File "/v/lib/python3.11/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/src/pretrain/loop.py", line 120 in agree
  File "/src/pretrain/main.py", line 66 in <module>
"""
SPY = """Process 17: python main.py
Python v3.11.2 (/usr/bin/python3.11)

Thread 17 (idle): "MainThread"
    agree (/src/pretrain/loop.py:120)
    <module> (/src/pretrain/main.py:66)
Thread 19 (idle): "prefetch"
    wait (/v/lib/python3.11/threading.py:331)
"""


def test_stacks_are_read() -> None:
    frames = main_frames(FAULT)
    assert frames[0] == "all_reduce (torch/distributed/distributed_c10d.py:3012)" and frames[2] == "agree (pretrain/loop.py:120)"
    assert waits_in(state(0, frames=frames)) == "all_reduce"
    assert main_frames(SPY) == ("agree (pretrain/loop.py:120)", "<module> (pretrain/main.py:66)")
    assert main_frames("Segmentation fault") == () == main_frames("")
    assert waits_in(state(0, frames=PRODUCT)) == "", "the frame of DDP around a product is no collective"
    p2p = tuple(f"{name} (megatron/core/pipeline_parallel/p2p_communication.py:9)" for name in ("_communicate", "recv_forward"))
    assert waits_in(state(0, frames=p2p)) == "recv_forward"


RANK = """
import ctypes, os, sys
from pretrain.run.heartbeat import Heartbeat
def stuck_in_c():
    mutex = ctypes.create_string_buffer(128)
    print("ready", flush=True)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
Heartbeat(os.environ).start()
stuck_in_c()
"""


def test_a_process_stuck_in_c_gives_its_stack_and_a_stopped_one_its_state(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    env = {**os.environ, "PHALANX_BEAT_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py")], env={**env, "RANK": rank}, stdout=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    try:
        for process in ranks:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        ranks[1].send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while state_of(ranks[1].pid, 0) != "stopped" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(children_of(os.getpid())) >= {process.pid for process in ranks}
        assert catches(ranks[0].pid, signal.SIGUSR2) and not catches(ranks[0].pid, signal.SIGUSR1)
        states = HeartbeatReader(tmp_path, replace(policy(), processes_per_node=2), "node0").look()
        assert [s.process for s in states] == ["alive", "stopped"]
        found, text = collect_stacks(tmp_path, states, answer_s=20.0)
        assert found[0].frames[0].startswith("stuck_in_c (") and "=== rank 0" in text
        assert stack_path(tmp_path, 1).stat().st_size == 0, "a stopped process isn't asked"
        assert ranks[0].poll() is None, "asking ends nobody"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [s.process for s in HeartbeatReader(tmp_path, replace(policy(), processes_per_node=2), "n").look()] == ["gone", "gone"]


# Folders and logs of a node.


def test_a_scratch_folder_goes_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    left_behind = tmp_path / f"phalanx-{os.getuid()}-beats-killed"
    (left_behind / "sub").mkdir(parents=True)
    os.utime(left_behind, (0, 0))
    with scratch_folder("beats") as mine:
        assert mine.parent == tmp_path and not left_behind.exists()
        os.utime(mine, (0, 0))
        with scratch_folder("beats") as other:
            assert mine.exists() and other != mine, "its owner lives"
    assert not mine.exists()


def test_gathered_lines_come_whole_and_once(tmp_path: Path) -> None:
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir()
    shared.mkdir()
    logs = GatheredLogs(own, shared, "n1")
    generator = random.Random(1)
    said: dict[int, list[str]] = {0: [], 12: []}
    with open(own / "rank_0.log", "a") as zero, open(own / "rank_12.log", "a") as twelve:
        for number in range(200):
            rank, file = generator.choice([(0, zero), (12, twelve)])
            text = f"line {number} " + "ä" * generator.randint(0, 40)
            said[rank].append(text)
            file.write(text[:3])
            file.flush()
            logs.pump()
            file.write(text[3:] + "\n")
        twelve.write("without end")
        said[12].append("without end")
    logs.close([])
    lines = (shared / "n1.log").read_text().splitlines()
    for rank, own_lines in said.items():
        assert [line.removeprefix(f"[rank {rank}] ") for line in lines if line.startswith(f"[rank {rank}] ")] == own_lines
    assert len(lines) == 201
