"""The plan is text: the line is exact, pure, and the same for a dry run and a start."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from configs.own_packages import STARTER
from configs.schema import Config
from launch.plan import ENV_DEFAULTS, check_local, make_plan, manual_start_text, program_path, torchrun_line


def config(nodes: int = 1, processes: int = 4) -> Config:
    made = Config()
    made.run.name = "a run"
    made.launch.nodes, made.launch.processes_per_node = nodes, processes
    return made


def test_the_line_is_what_a_person_would_type() -> None:
    plan = make_plan(config(), "my config.yaml", ["run.steps=5", "data.train=[{path: x, weight: 1}]"], {})
    line = torchrun_line(plan)
    assert line == (
        "CUDA_DEVICE_MAX_CONNECTIONS=1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1 TOKENIZERS_PARALLELISM=false "
        f"{sys.executable} -P {STARTER} launch.torchrun --nnodes 1 --nproc-per-node 4 --rdzv-backend c10d "
        "--rdzv-endpoint 127.0.0.1:0 --rdzv-id 'a run' --local-addr 127.0.0.1 --max-restarts 0 "
        "--run-path --start-method forkserver "
        f"{shlex.quote(program_path())} --config 'my config.yaml' run.steps=5 'data.train=[{{path: x, weight: 1}}]'"
    )
    assert shlex.split(line)[len(plan.env) :] == plan.argv


def test_ranks_that_import_themselves_are_plain_torchruns() -> None:
    made = config()
    made.launch.shared_imports = False
    argv = make_plan(made, "c", [], {}).argv
    assert "--run-path" not in argv and argv[-4:-1] == ["0", program_path(), "--config"]


def test_the_program_is_the_installed_one() -> None:
    path = Path(program_path())
    assert path.name == "main.py" and path.parent.name == "pretrain" and path.is_absolute()


def test_environment_gives_way_to_the_user() -> None:
    made = config()
    made.launch.env = {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "INFO"}
    env = dict(make_plan(made, "c", [], {"TOKENIZERS_PARALLELISM": "true"}).env)
    assert env["OMP_NUM_THREADS"] == "3" and env["NCCL_DEBUG"] == "INFO"
    assert "TOKENIZERS_PARALLELISM" not in env
    assert all(reason for _, reason in ENV_DEFAULTS.values())


def test_gpus_get_segments_that_grow_unless_the_user_says_otherwise() -> None:
    made, name = config(), "PYTORCH_CUDA_ALLOC_CONF"
    assert name not in dict(make_plan(made, "c", [], {}).env)
    made.cluster.gpu = "H100-SXM-80GB"
    assert f"{name}=expandable_segments:True" in torchrun_line(make_plan(made, "c", [], {}))
    assert name not in dict(make_plan(made, "c", [], {name: "x"}).env)
    assert name not in dict(make_plan(made, "c", [], {"PYTORCH_ALLOC_CONF": "x"}).env)
    made.launch.env = {"PYTORCH_ALLOC_CONF": "x"}
    assert name not in dict(make_plan(made, "c", [], {}).env)
    made.launch.env = {name: "y"}
    assert dict(make_plan(made, "c", [], {}).env)[name] == "y"
    made.cluster.device, made.launch.env = "cpu", {}
    assert name not in dict(make_plan(made, "c", [], {}).env)


def test_experts_tokens_get_a_queue_of_their_own() -> None:
    made = config()
    assert dict(make_plan(made, "c", [], {}).env)["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    made.parallel.overlap_expert_comm = True
    assert dict(make_plan(made, "c", [], {}).env)["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


def test_a_fixed_port_is_used() -> None:
    made = config()
    made.launch.master_port = 31234
    assert make_plan(made, "c", [], {}).rendezvous == "127.0.0.1:31234"


def test_several_machines_get_the_line_to_run_by_hand() -> None:
    made = config(nodes=2)
    (problem,) = check_local(made, {})
    assert problem.path == "launch.nodes" and problem.got == 2 and "--dry-run" in problem.fix
    text = manual_start_text(make_plan(made, "c", [], {}))
    assert "--nnodes 2" in text and "--rdzv-endpoint HOST:29500" in text and "--local-addr" not in text
    assert check_local(config(), {}) == []
    made.launch.target = "slurm"
    assert check_local(made, {}) == []
