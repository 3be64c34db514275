"""The doctor: every check can fail, what is silent is named with its reason, and this machine is looked at for real."""

from __future__ import annotations

import copy
import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.schema import BlendPart, Config
from launch.doctor.disk_facts import disk_facts
from launch.doctor.finding import FAIL, OK, WARN, worst
from launch.doctor.gpu_facts import BASIC, HEALTH, parse_gpus
from launch.doctor.network_checks import compare
from launch.doctor.node_checks import can_join_network_probe, check_node
from launch.doctor.node_facts import memory_facts
from launch.doctor.report import as_document, describe, judge
from launch.doctor.request import CheckupRequest, ProbeSizes, make_request
from launch.doctor.results import CheckupResults, read_results, ready_nodes
from launch.doctor.slurm import render
from launch.slurm.script import ScriptLocation
from pretrain.run.folder import RunFolder, check_run_folder
from tests.launch.slurm.test_script import hostile
from tools import cli

H100 = {"name": "NVIDIA H100 80GB HBM3", "driver": "570.1", "total_mib": 81559, "used_mib": 4, "celsius": 41,
        "uncorrected_errors": 0, "rows_pending": False, "hot": False, "power_brake": False}  # fmt: skip


def request(**changed: Any) -> CheckupRequest:
    config = Config()
    config.cluster.gpu, config.cluster.interface = "H100-SXM-80GB", "ib0"
    made = make_request(config, Path("/runs/a/doctor/0001"), Path("/work"), 4, 8, ProbeSizes())
    return replace(made, **changed)


def sound(**changed: Any) -> dict[str, Any]:
    """A node with 8 GPUs that nothing is wrong with; `changed`: section__name=value."""
    facts: dict[str, Any] = {
        "node": "n1", "hostname": "n1", "kernel": "6.1", "cores": 96, "time_s": 0.0, "address": "10.0.0.1", "address_error": "",
        "python": {"version": "3.11.7", "executable": "/sw/python"},
        "packages": {"torch": "2.13.0", "megatron-core": "0.16.1", "deepspeed": "0.19.8", "wandb": "0.31.0",
                     "transformer-engine": "2.9", "phalanx": "0.1.0"},
        "memory": {"total_gib": 2000.0, "available_gib": 1900.0, "limit_gib": None, "shm_free_gib": 900.0},
        "limits": {"open_files": 65536, "locked_kib": None},
        "interfaces": {"lo": {"up": True, "addresses": ["127.0.0.1"]}, "ib0": {"up": True, "addresses": ["10.1.0.1"]},
                       "ib1": {"up": False, "addresses": []}, "eth9": {"up": True, "addresses": []}},
        "files": {"missing": []},
        "disk": {"path": "/runs/a/doctor/0001", "error": "", "same": True, "free_gib": 5e4, "total_gib": 1e5, "free_inodes": None,
                 "write_mib_s": 900.0, "read_mib_s": 2000.0, "small_file_ms": 1.0},
        "gpus": {"error": "", "gpus": [{"index": index, **H100} for index in range(8)]},
        "torch": {"error": "", "version": "2.13.0", "cuda": "12.9", "nccl": "2.27.3", "import_s": 4.0,
                  "gpus": [H100["name"]] * 8},
    }  # fmt: skip
    facts = copy.deepcopy(facts)
    for path, value in changed.items():
        section, _, name = path.partition("__")
        if name:
            facts[section][name] = value
        else:
            facts[section] = value
    return facts


def gpus(**changed: Any) -> list[dict[str, Any]]:
    return [{"index": 0, **H100, **changed}] + [{"index": index, **H100} for index in range(1, 8)]


def test_a_sound_node_is_ok() -> None:
    assert [finding for finding in check_node(sound(), request()) if finding.level != OK] == []
    assert all(finding.fix == "" for finding in check_node(sound(), request()))


@pytest.mark.parametrize(
    ("planted", "name", "level", "words"),
    [
        ({"torch__error": "ImportError: libcudart.so.12"}, "torch", FAIL, "libcudart"),
        ({"torch__import_s": 95.0}, "torch", WARN, "95 s"),
        ({"packages__megatron-core": None}, "packages", FAIL, "missing: megatron-core"),
        ({"disk__error": "No space left on device: /runs"}, "run folder", FAIL, "No space left"),
        ({"disk__same": False}, "run folder", FAIL, "another folder"),
        ({"disk__free_gib": 0.5}, "run folder", FAIL, "0.5 GiB"),
        ({"disk__free_gib": 6.0}, "run folder", WARN, "6 GiB"),
        ({"disk__free_inodes": 12}, "run folder", WARN, "12 files more"),
        ({"disk__write_mib_s": 8.0}, "disk speed", WARN, "8 MiB/s written"),
        ({"disk__small_file_ms": 45.0}, "disk speed", WARN, "45 ms"),
        ({"files__missing": ["/data/x.bin"]}, "data", FAIL, "/data/x.bin"),
        ({"memory__available_gib": 6.0}, "memory", FAIL, "0.8 a rank"),
        ({"memory__available_gib": 12.0}, "memory", WARN, "1.5 a rank"),
        ({"memory__shm_free_gib": 0.0625}, "/dev/shm", WARN, "0.06 GiB free"),
        ({"memory__shm_free_gib": None}, "/dev/shm", WARN, "none"),
        ({"limits__open_files": 256}, "open files", WARN, "256"),
        ({"limits__locked_kib": 8192}, "locked memory", WARN, "0.0078 GiB"),
        ({"interfaces": {"lo": {"up": True, "addresses": ["127.0.0.1"]}}}, "network interface", FAIL, "there is no ib0"),
        ({"torch__gpus": [H100["name"]] * 7}, "GPUs", FAIL, "torch sees 7"),
        ({"torch__gpus": []}, "GPUs", FAIL, "torch sees 0, nvidia-smi lists 8"),
        ({"gpus__gpus": gpus(name="NVIDIA A100-SXM4-80GB")}, "GPU kind", WARN, "A100"),
        ({"gpus__gpus": gpus(uncorrected_errors=3)}, "GPU health", FAIL, "GPU 0: 3 uncorrected memory errors"),
        ({"gpus__gpus": gpus(hot=True, celsius=91)}, "GPU health", WARN, "heat (91 °C)"),
        ({"gpus__gpus": gpus(power_brake=True)}, "GPU health", WARN, "power supply"),
        ({"gpus__gpus": gpus(rows_pending=True)}, "GPU health", WARN, "wait for a reset"),
        ({"gpus__gpus": gpus(used_mib=70000)}, "GPU memory", WARN, "GPU 0: 68.4 GiB in use"),
    ],
)  # fmt: skip
def test_each_check_can_fail(planted: dict[str, Any], name: str, level: str, words: str) -> None:
    (found,) = [finding for finding in check_node(sound(**planted), request()) if finding.level != OK]
    assert (found.name, found.level) == (name, level) and words in found.value, found
    assert found.expected and found.fix


def test_the_interface_as_nccl_takes_it() -> None:
    names = {
        "ib0": OK,
        "=ib0": OK,
        "ib": OK,
        "^docker": OK,
        "ib0:1": OK,
        "lo,ib0": OK,
        "ib1": FAIL,
        "eth9": FAIL,
        "lo,eth1": FAIL,
    }
    for name, level in names.items():
        (found,) = [item for item in check_node(sound(), request(interface=name)) if item.name == "network interface"]
        assert found.level == level, name
    unknown = sound(address="", address_error="Name or service not known")
    assert worst(check_node(unknown, request(interface=None))) == FAIL, "gloo asks for the host's own name"
    assert worst(check_node(unknown, request(interface=None, nodes=1))) == OK


def test_on_cpus_no_gpu_is_asked_for() -> None:
    made = request(gpu=None, device="cpu")
    bare = sound(gpus={"error": "nvidia-smi is not on PATH", "gpus": []}, torch__gpus=[], memory__shm_free_gib=0.5)
    assert worst(check_node(bare, made)) == OK
    assert not can_join_network_probe(sound(), made), "hidden they must be"
    assert not can_join_network_probe(bare, request()), "8 ranks can't start on no GPU"


def four(**planted: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {**sound(**planted.get(name, {})), "node": name} for name in ("n1", "n2", "n3", "n4")}


def ring(**figures: float) -> dict[str, Any]:
    """A ring of four; n1n2=3.0 changes an edge."""
    names = ["n1", "n2", "n3", "n4"]
    edges = [(first, names[(index + 1) % 4]) for index, first in enumerate(names)]
    between = [{"nodes": [a, b], "gbit_s": {"64": figures.get(a + b, 390.0)}} for a, b in edges]
    return {
        "done": True, "backend": "nccl", "nodes": names, "between": between, "inside": [],
        "clocks": [{"node": name, "offset_s": 0.0, "bound_s": 0.001} for name in names],
        "compute": [{"node": name, "product_s": 0.002} for name in names], "all": {"ranks": 32, "gbit_s": {"64": 300.0}},
    }  # fmt: skip


def bad(nodes: dict[str, Any], network: dict[str, Any] | None, **changed: Any) -> dict[str, list[tuple[str, str]]]:
    found = compare(nodes, network, request(**changed))
    return {node: [(item.name, item.level) for item in items if item.level != OK] for node, items in found.items()}


def test_equal_nodes_are_ok() -> None:
    assert bad(four(), ring()) == {"n1": [], "n2": [], "n3": [], "n4": []}


def test_the_odd_version_is_named() -> None:
    found = bad(four(n3={"packages__torch": "2.12.0"}, n2={"python__version": "3.12.1"}), None)
    assert found == {"n1": [], "n2": [("versions", WARN)], "n3": [("versions", FAIL)], "n4": []}
    (odd,) = [item for item in compare(four(n3={"torch__nccl": "2.20"}), None, request())["n3"] if item.level != OK]
    assert odd.value == "NCCL 2.20" and odd.expected == "NCCL 2.27.3"


def test_a_lost_memory_module_is_named() -> None:
    assert bad(four(n4={"memory__total_gib": 1750.0}), None)["n4"] == [("memory size", WARN)]


@pytest.mark.parametrize(("offset_s", "level"), [(0.9, None), (1.5, WARN), (-300.0, FAIL)])
@pytest.mark.parametrize("late", [0, 2])
def test_the_odd_clock_is_named(offset_s: float, level: str | None, late: int) -> None:
    """Also when it is the first node's, against which all were measured."""
    network = ring()
    for index, row in enumerate(network["clocks"]):
        row["offset_s"] = offset_s * ((index == late) - (late == 0))
    found = bad(four(), network)
    assert found.pop(f"n{late + 1}") == ([("clock", level)] if level else [])
    assert not any(found.values())


def test_what_a_round_trip_leaves_open_is_no_skew() -> None:
    network = ring()
    network["clocks"][1] |= {"offset_s": 4.0, "bound_s": 3.5}
    assert not any(bad(four(), network).values())


@pytest.mark.parametrize(("seconds", "level"), [(0.0029, None), (0.0031, WARN), (0.0061, FAIL)])
def test_a_slow_node_is_named(seconds: float, level: str | None) -> None:
    network = ring()
    network["compute"][3]["product_s"] = seconds
    assert bad(four(), network)["n4"] == ([("compute", level)] if level else [])


def test_a_slow_card_a_slow_way_and_a_slow_network_are_told_apart() -> None:
    card = bad(four(), ring(n1n2=60.0, n2n3=60.0), network_gbit_s=None)
    assert card == {"n1": [], "n2": [("network", FAIL)], "n3": [], "n4": []}, "slow with both of its neighbours"
    assert bad(four(), ring(n1n2=150.0, n2n3=150.0), network_gbit_s=None)["n2"] == [("network", WARN)]
    way = bad(four(), ring(n2n3=60.0), network_gbit_s=None)
    assert way == {"n1": [], "n2": [("network", WARN)], "n3": [("network", WARN)], "n4": []}
    everywhere = ring(n1n2=25.0, n2n3=25.0, n3n4=25.0, n4n1=25.0)
    assert set(map(tuple, bad(four(), everywhere).values())) == {(("network against the cluster file", WARN),)}
    assert request().network_gbit_s == 400, "typical for the GPU, where the cluster file doesn't say"
    assert not any(bad(four(), everywhere, network_gbit_s=None).values()), "nothing to compare with"


@pytest.mark.parametrize(("figure", "level"), [(1300.0, None), (1100.0, WARN), (500.0, FAIL)])
def test_a_broken_link_inside_a_node_is_named(figure: float, level: str | None) -> None:
    network = ring()
    network["inside"] = [{"node": name, "ranks": 8, "gbit_s": {"1": 90.0, "64": 2400.0}} for name in network["nodes"]]
    network["inside"][1]["gbit_s"]["64"] = figure
    assert bad(four(), network) == {"n1": [], "n2": [("inside", level)] if level else [], "n3": [], "n4": []}


def test_nvidia_smi_is_read() -> None:
    text = (
        "0, NVIDIA H100 80GB HBM3, 570.1, 81559, 4, 41, 0, No, Not Active, Active\n"
        "1, Tesla T4, 570.1, 15360, 4, 50, [N/A], [N/A], Active, [Not Supported]\n"
    )
    first, second = parse_gpus(text, tuple(BASIC | HEALTH))
    assert first["power_brake"] is True and first["hot"] is False and first["total_mib"] == 81559
    assert second["uncorrected_errors"] is None and second["hot"] is True and second["power_brake"] is None


def test_the_disk_is_measured_and_its_refusal_told(tmp_path: Path) -> None:
    (tmp_path / "nonce").write_text("x")
    facts = disk_facts(tmp_path, "n1", "x", 1)
    assert facts["same"] and not facts["error"] and facts["write_mib_s"] > 0 and facts["read_mib_s"] > 0
    assert not disk_facts(tmp_path, "n1", "y", 0)["same"]
    assert [path.name for path in tmp_path.iterdir()] == ["nonce"], "nothing stays"
    assert "No such file" in disk_facts(tmp_path / "absent", "n1", "x", 1)["error"]


def test_a_containers_memory_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{2 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 30}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 29}\n")
    facts = memory_facts(tmp_path, str(tmp_path))
    assert facts["limit_gib"] == 2.0 and facts["available_gib"] == 1.5, "the page cache can be given back"
    assert memory_facts(tmp_path, str(tmp_path / "absent"))["shm_free_gib"] is None


LOG = """\
srun: error: node2: task 1: Exited with exit code 127
1: slurmstepd-node2: error: execve(): /sw/python: No such file or directory
2: Traceback (most recent call last):
2:   File "x.py", line 1, in <module>
2: ModuleNotFoundError: No module named 'launch'
srun: error: node2: task 1: Exited with exit code 1
srun: error: Node failure on node5
"""


def folder_of_results(folder: Path, nodes: dict[str, Any]) -> CheckupRequest:
    (folder / "nodes").mkdir()
    for name, facts in nodes.items():
        (folder / "nodes" / f"{name}.json").write_text(json.dumps(facts))
    return request(folder=str(folder), processes_per_node=1, nodes=5)


def test_a_silent_node_is_named_with_its_own_words(tmp_path: Path) -> None:
    made = folder_of_results(tmp_path, {"node1": {**sound(), "node": "node1"}})
    (tmp_path / "nodes.log").write_text(LOG)
    found = read_results(tmp_path, made, ["node1", "node2", "node3", "node4", "node5"])
    assert found.silent == {
        "node2": "execve(): /sw/python: No such file or directory",
        "node3": "ModuleNotFoundError: No module named 'launch'",
        "node4": "it gave no answer",
        "node5": "srun: error: Node failure on node5",
    }
    verdict = judge(found, made, ["node1", "node2", "node3", "node4", "node5"])
    assert not verdict.ok and [node.verdict for node in verdict.nodes] == [OK, FAIL, FAIL, FAIL, FAIL]
    assert "node2  FAIL  no answer" in describe(verdict) and "NOT FIT" in describe(verdict)


def test_a_node_that_hangs_is_said_to_hang(tmp_path: Path) -> None:
    made = folder_of_results(tmp_path, {"node1": {**sound(), "node": "node1"}})
    log = "srun: First task exited 90s ago\nsrun: StepId=22.0 task 1: running\nsrun: error: node2: task 1: Killed\n"
    (tmp_path / "nodes.log").write_text(log)
    assert read_results(tmp_path, made, ["node1", "node2"]).silent == {
        "node2": "it gave no answer within 90s of the first node's"
    }


def test_what_the_ranks_measured_before_they_broke_off_stands(tmp_path: Path) -> None:
    made = folder_of_results(tmp_path, four())
    names = list(four())
    (tmp_path / "network.json").write_text(json.dumps({"done": False, "backend": "gloo", "nodes": names, "clocks": []}))
    (tmp_path / "network.log").write_text(
        "1: [rank1]: RuntimeError: Connection closed by peer\nsrun: error: x: Exited with exit code 1\n"
    )
    found = read_results(tmp_path, made, names)
    assert found.network_error == "it came as far as clocks: [rank1]: RuntimeError: Connection closed by peer"
    assert found.broke == {}, "srun's x is none of them"
    log = "1: [rank1]: RuntimeError: NCCL error\nsrun: error: n2: task 1: Exited with exit code 1\n0: Error: closed by peer\n"
    (tmp_path / "network.log").write_text(log + "srun: error: n1: task 0: Exited with exit code 1\n")
    assert read_results(tmp_path, made, names).broke == {"n2": "[rank1]: RuntimeError: NCCL error"}, "the first one's end"
    verdict = judge(read_results(tmp_path, made, names), made, names)
    assert [node.verdict for node in verdict.nodes] == [OK, FAIL, OK, OK]
    document = as_document(judge(found, made, names))
    assert document["network"]["error"] == found.network_error and not document["ok"]
    assert ready_nodes(tmp_path, made, names) == names
    (tmp_path / "nodes" / "n2.json").write_text(json.dumps({**sound(torch__error="no"), "node": "n2"}))
    assert ready_nodes(tmp_path, made, names) == ["n1", "n3", "n4"], "it would keep the others waiting"


def test_a_thousand_nodes_are_told_in_a_page() -> None:
    nodes = {f"n{index}": {**sound(limits__open_files=1024), "node": f"n{index}"} for index in range(1000)}
    nodes["n7"]["disk"]["error"] = "Stale file handle: /runs"
    text = describe(judge(CheckupResults(nodes, {}, None, "", {}), request(nodes=1000), list(nodes)))
    assert text.count("open files on n0, n1") == 1 and "and 968 more" in text
    assert text.index("FAIL  run folder on n7") < text.index("WARN  open files")


@pytest.mark.parametrize(
    "payload", ['"; touch canary; "', "'; touch canary; '", "$(touch canary)", "`touch canary`", "\\", "{nodes}"]
)
def test_no_string_of_the_config_is_a_command(payload: str, tmp_path: Path) -> None:
    made = hostile(payload)
    made.data.train = [BlendPart(path=payload)]
    asked = make_request(made, tmp_path / payload, tmp_path, 2, 2, ProbeSizes())
    text = render(made, asked, ScriptLocation(tmp_path / payload, tmp_path, "/usr/bin/python3"))
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    lines = f"module() {{ :; }}\nscontrol() {{ :; }}\nsrun() {{ :; }}\ntimeout() {{ :; }}\n{text}"
    env = {
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "2",
    }
    subprocess.run(["bash", "-c", lines], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert not list(tmp_path.rglob("canary"))
    (line,) = [line for line in text.splitlines() if line.startswith("request=")]
    assert CheckupRequest.from_json(shlex.split(line.removeprefix("request="))[0]) == asked


def test_the_job_is_short_and_asks_for_the_runs_nodes() -> None:
    config = Config()
    config.launch.nodes, config.launch.slurm.time, config.launch.slurm.partition = 4, "7-00:00:00", "gpu"
    config.launch.slurm.requeue, config.launch.slurm.dependency = True, "afterok:1"
    text = render(config, request(), ScriptLocation(Path("/runs/a/doctor/0001"), Path("/work"), "/usr/bin/python3"))
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=4", "--partition=gpu", "--time=10", "--no-requeue", "--no-kill", "--job-name=run-doctor"} <= set(lines)
    assert not any(line.startswith(("--signal", "--dependency")) for line in lines)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(["doctor", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_bad_input_is_refused_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, path in (
        (["launch.nodes=2"], "CONFIG"), (["quickstart", "launch.nodez=2"], "launch.nodez"),
        (["quickstart", "--timeout", "0"], "--timeout"),
        (["quickstart", "cluster.interface=a b"], "cluster.interface"), (["quickstart", "launch.nodes=0"], "launch.nodes"),
    ):  # fmt: skip
        code, out, err = run(capsys, *words, "--json")
        assert code == 2 and [problem["path"] for problem in json.loads(out)["problems"]] == [path], err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").touch()
    assert run(capsys, "quickstart", "run.dir=theirs")[0] == 2
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.tex"]


HERE = ("quickstart", "run.dir=here", "data.train=[]", "data.tokenizer.path=null", "launch.processes_per_node=2", "--quick")


def test_this_machine_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, *HERE, "--json")
    document = json.loads(out)
    (node,) = document["nodes"]
    told = {finding["name"]: finding for finding in node["findings"]}
    assert {name for name, finding in told.items() if finding["level"] == FAIL} == set() and code == 0, told
    assert document["ok"] and document["job"] is None and told["data"]["value"] == "0 there"
    (inside,) = document["network"]["inside"]
    assert inside["ranks"] == 2 and all(figure > 0 for figure in inside["gbit_s"].values())
    assert node["facts"]["packages"]["torch"] == node["facts"]["torch"]["version"]
    folder = Path(document["folder"])
    assert folder == tmp_path / "here" / "doctor" / "0001" and json.loads((folder / "verdict.json").read_text()) == document
    assert check_run_folder(RunFolder(tmp_path / "here")) == [], "a run may begin there"


@pytest.mark.prove
def test_this_machine_without_its_interface(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, *HERE, "cluster.interface=nosuch", "data.tokenizer.path=absent.model")
    assert code == 1 and "FAIL  network interface on" in out and "absent.model" in out and "doctor/0001" in out
