"""Whatever a cluster does to a run, it ends with the weights of an undisturbed one, as one run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.run.beat import BUILDING, COMPUTING, ENDING, READING, SAVING, STARTING, VALIDATING
from pretrain.run.files import iterate_lines
from tests.run.world import check_equal
from tests.slurm import world
from tests.slurm.cluster import Cluster
from tests.slurm.world import NODES, STEPS, WORDS, Run, act, phalanx, submit
from tests.wandb_stub import KEY, WandbStub

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

# For a rank that is stopped on purpose. On a busy machine a step of a healthy run may take some seconds too.
WATCHFUL = "launch.watch.step_timeout_s=12"


def check_one_run(run: Run, quiet: Path, causes: Sequence[str], server: WandbStub | None = None) -> None:
    """Over and finished after these causes; the weights, the record and W&B as if nothing had happened."""
    life = run.wait_over()
    assert life.state == "finished", run.story()
    assert [end.cause for end in life.ends] == [*causes, "finished"], run.story()
    (wandb_id,) = {row["wandb_id"] for row in run.events("attempt")}
    check_equal(run.folder.path, quiet, STEPS, server.runs[wandb_id].steps() if server else None)
    check_goodput(run, causes)


def check_goodput(run: Run, causes: Sequence[str]) -> None:
    """From the submission to the end of the last attempt, every second once."""
    goodput = json.loads(phalanx("status", str(run.folder.path), "--json").stdout)["goodput"]
    del goodput["ratio"]
    whole_s = run.events("job_ended")[-1]["time"] - run.events("job_submitted")[0]["time"]
    assert sum(goodput.values()) == pytest.approx(whole_s, rel=0.05, abs=2.0), goodput
    assert goodput["steps_s"] > 0 and goodput["startup_s"] > 0 and goodput["queue_s"] > 0, goodput
    assert (goodput["detection_s"] > 10) == ("hung" in causes), goodput


def act_one_by_one(run: Run, *acts: tuple[Callable[[Run], str], str]) -> None:
    for way, phase in acts:
        act(run, way, phase=phase)


def test_two_runs_side_by_side_survive_all_that_happens_to_them(
    cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path
) -> None:
    """One job, online, is preempted while it saves, and hangs; the other lives through a controller's crash, and comes near its
    time limit while it validates. Crashes and lost nodes: test_restart.py.
    """
    with WandbStub() as server:
        online = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}
        second = submit(cluster, run_config, tmp_path / "second")
        act(second, world.restart_controller)
        # Only now: on a quick machine its steps would be over before the controller is back.
        first = submit(cluster, run_config, tmp_path / "first", WATCHFUL, **online)
        with ThreadPoolExecutor() as pool:
            acts = [
                pool.submit(act_one_by_one, first, (world.preempt, SAVING), (world.stop_a_rank, "")),
                pool.submit(act_one_by_one, second, (world.near_the_limit, VALIDATING)),
            ]
        for done in acts:
            done.result()
        hung = first.events("hung")
        check_one_run(first, quiet, ["preempted", "hung"], server)
    check_one_run(second, quiet, ["time_limit"])
    assert len(hung) == 1 and "rank 1" in hung[0]["why"], first.story()


def test_the_batch_script_can_be_submitted_by_hand_and_goes_on_with_fewer_nodes(
    cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path
) -> None:
    """Only one node is left in the end: launch.slurm.min_nodes lets the layout's one replica of two stages go there."""
    words = ["launch.slurm.min_nodes=1", "launch.processes_per_node=2", "parallel.pipeline=2", "batch.micro_batch_seqs=2"]
    script = phalanx("launch", str(run_config), f"run.dir={tmp_path / 'run'}", *NODES, *WORDS, *words, "--dry-run")
    assert script.returncode == 0 and "#SBATCH --nodes=1-2\n" in script.stdout
    run = submit(cluster, run_config, tmp_path / "run", *words, "launch.slurm.extra=[--begin=now+1hour]")
    subprocess.run(["scancel", str(run.job)], check=True)
    written = (tmp_path / "run" / "launch" / "job_0001" / "batch.sh").read_text()
    by_hand = tmp_path / "mine.sh"
    by_hand.write_text(written.replace("#SBATCH --begin=now+1hour\n", ""))
    for node in cluster.nodes[1:]:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=drain", "reason=test"], check=True)
    try:
        subprocess.run(["sbatch", str(by_hand)], check=True)
        life = run.wait_over()
    finally:
        for node in cluster.nodes[1:]:
            subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=True)
    assert life.state == "finished" and run.events("job_attempt")[-1]["nodes"] == ["node1"], run.story()
    rows = [row for _, row in iterate_lines(run.folder.metrics) if row]
    assert len(rows) == STEPS


@pytest.mark.prove
def test_a_killed_agent_is_not_a_lost_node(cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path) -> None:
    run = submit(cluster, run_config, tmp_path / "run")
    act(run, world.kill_an_agent)
    end = run.life.ends[0]
    assert end.node == run.events("job_attempt")[0]["nodes"][-1] and f"the agent of {end.node} was killed" in end.why, run.story()
    check_one_run(run, quiet, ["killed"])


@pytest.mark.prove
def test_a_signal_in_any_phase(cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path) -> None:
    """Before the ranks know their config, in their first step: each is one attempt of the run. At its end it is finished."""
    phases = (STARTING, BUILDING, READING, COMPUTING, VALIDATING, SAVING, ENDING)
    run = submit(cluster, run_config, tmp_path / "run", f"launch.slurm.max_without_progress={len(phases)}")
    for phase in phases:
        act(run, world.usr1, phase=phase)
    check_one_run(run, quiet, ["preempted"] * (len(phases) - 1))


@pytest.mark.prove
@pytest.mark.parametrize(
    "words", [["launch.slurm.extra=[--exclusive,--no-requeue]"], ["launch.slurm.requeue=false", "launch.slurm.chain=1"]]
)
def test_where_requeue_is_forbidden(cluster: Cluster, run_config: Path, quiet: Path, tmp_path: Path, words: list[str]) -> None:
    """The script is submitted again from inside the job, or the next job of the chain goes on; bounds still count."""
    run = submit(cluster, run_config, tmp_path / "run", *words)
    act(run, world.usr1)
    check_one_run(run, quiet, ["preempted"])
    assert len(run.life.jobs) == 2 and [row["job"] for row in run.events("job_attempt")] == list(run.life.jobs), run.story()
