"""The doctor over a real allocation: nodes that are broken are named, the others are measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import scheduler
from tests.run.world import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.world import phalanx

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

CONFIG = """\
base: [model/tiny_moe, cluster/laptop]
run: {name: looked at}
launch: {target: slurm, nodes: 4, processes_per_node: 1, slurm: {extra: [--exclusive], nodelist: 'node[1-4]'}}
cluster: {interface: lo}
"""
# Stands before the ranks' Python: what a node's own disk or environment may do to it.
WRAPPER = """\
#!/bin/bash
case $SLURMD_NODENAME in
  node2) echo "/sw: mount point is empty" >&2; exit 127;;
  node3) export PYTHONPATH={broken};;
  node4) {node4};;
esac
exec {python} "$@"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """With spaces in its path, as run.name has one."""
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "c.yaml").write_text(CONFIG)
    return folder / "c.yaml"


def wrapper(folder: Path, node4: str = ":") -> str:
    (folder / "broken" / "torch").mkdir(parents=True)
    (folder / "broken" / "torch" / "__init__.py").write_text(
        'raise ImportError("libcudart.so.12: cannot open shared object file")'
    )
    path = folder / "python"
    path.write_text(WRAPPER.format(broken=folder / "broken", python=sys.executable, node4=node4))
    path.chmod(0o755)
    return str(path)


def doctor(*words: str) -> tuple[int, dict[str, Any], str]:
    done = phalanx("doctor", *words, "--quick", "--json", timeout_s=200)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def failures(document: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    return {
        node["node"]: [(found["name"], found["value"]) for found in node["findings"] if found["level"] == "fail"]
        for node in document["nodes"]
    }


def test_broken_nodes_are_named_and_the_others_measured(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    code, document, err = doctor(str(config), f"launch.slurm.python={wrapper(tmp_path)}", f"run.dir={tmp_path}/the run")
    assert code == 1 and not document["ok"], err
    assert failures(document) == {
        "node1": [],
        "node2": [("answer", "/sw: mount point is empty")],
        "node3": [("torch", "ImportError: libcudart.so.12: cannot open shared object file")],
        "node4": [],
    }, err
    network = document["network"]
    assert network["error"] is None and network["nodes"] == ["node1", "node4"]
    (way,) = network["between"]
    assert way["nodes"] == ["node1", "node4"] and all(figure > 0 for figure in way["gbit_s"].values())
    assert document["job"]["state"] == "COMPLETED" and document["job"]["error"] is None
    assert document["folder"] == f"{tmp_path}/the run/doctor/0001"


def test_a_job_that_does_not_begin_names_the_nodes_that_are_away(cluster: Cluster, config: Path) -> None:
    subprocess.run(["scontrol", "update", "nodename=node3", "state=drain", "reason=fan broken"], check=True)
    try:
        code, document, err = doctor(
            str(config), f"launch.nodes={len(cluster.nodes)}", "launch.slurm.nodelist=null", "--timeout", "2"
        )
    finally:
        subprocess.run(["scontrol", "update", "nodename=node3", "state=resume"], check=True)
    assert code == 1 and document["nodes"] == [] and "pending" in err, (document["job"], err)
    assert "pending" in document["job"]["error"] and "node3 drained (fan broken)" in document["job"]["error"]
    assert not scheduler.find_jobs([document["job"]["number"]])[document["job"]["number"]].live, "it was cancelled"


def test_what_slurm_refuses_is_bad_input(cluster: Cluster, config: Path) -> None:
    code, document, _ = doctor(str(config), "launch.slurm.partition=nosuch")
    assert code == 2 and document["problems"][0]["path"] == "launch.slurm"
    assert "invalid partition" in document["problems"][0]["rule"]


def test_an_interrupt_takes_the_job_along(cluster: Cluster, config: Path) -> None:
    command = [sys.executable, "-m", "tools.cli", "doctor", str(config), "launch.slurm.extra=[--begin=now+600]"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    number = int(process.stderr.readline().split()[1].rstrip(":"))
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.stderr.close()
    assert scheduler.find_jobs([number])[number].state == "CANCELLED"


@pytest.mark.prove
def test_a_node_that_dies_in_the_middle_is_named(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """node4 loses power while it looks at itself; the answers of the others are there."""
    python = wrapper(tmp_path, node4=f"touch {tmp_path}/there; sleep 300")
    words = [str(config), f"launch.slurm.python={python}", f"run.dir={tmp_path}/r", "--quick", "--json"]
    command = [sys.executable, "-m", "tools.cli", "doctor", *words]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "there").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(15)
    cluster.power_off("node4")
    out, _ = process.communicate(timeout=250)
    document = json.loads(out)
    found = failures(document)
    assert process.returncode == 1 and found["node1"] == [] and found["node2"] and found["node3"] and found["node4"], out
    assert found["node4"][0][0] == "answer" and "node4" in found["node4"][0][1]
