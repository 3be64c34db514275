"""The batch script: a pure function of the config, readable, and deaf to whatever a string holds."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from configs.load import from_yaml_text, to_yaml
from configs.own_packages import STARTER
from configs.schema import Config
from configs.units import seconds_of
from launch.slurm.scheduler import SchedulerError, call_again
from launch.slurm.script import ScriptLocation, render, sbatch_lines
from launch.slurm.submit import check_slurm, script_of, sizes_of
from parallel.legality.verdict import check_config
from pretrain.run.folder import folder_of


def config(**slurm: object) -> Config:
    made = Config()
    made.model.num_layers, made.run.steps = 4, 10
    made.launch.target, made.launch.nodes, made.launch.processes_per_node = "slurm", 2, 2
    for name, value in slurm.items():
        setattr(made.launch.slurm, name, value)
    return made


def script(made: Config, folder: Path = Path("/work")) -> str:
    return render(made, folder_of(made), ScriptLocation(folder / "runs/run/launch/job_0001", folder, "/usr/bin/python3"))


def test_the_script_states_the_config() -> None:
    made = config(
        partition="gpu", account="proj-7", qos="high", time="1-00:00:00", constraint="a100&nvlink", gres="gpu:8", mem="0",
        cpus_per_task=96, exclude="n[1-2]", reservation="r", dependency="afterok:12", extra=["--mail-type=END"],
        modules=["cuda/12.4"], prologue=["ulimit -l unlimited"], srun_args=["--cpu-bind=none"],
    )  # fmt: skip
    made.launch.env = {"NCCL_DEBUG": "INFO"}
    made.cluster.interface = "ib0"
    text = script(made)
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --partition=gpu", "#SBATCH --account=proj-7", "#SBATCH --qos=high",
        "#SBATCH --time=1-00:00:00", "#SBATCH --constraint='a100&nvlink'", "#SBATCH --gres=gpu:8", "#SBATCH --mem=0",
        "#SBATCH --cpus-per-task=96", "#SBATCH --exclude='n[1-2]'", "#SBATCH --reservation=r",
        "#SBATCH --dependency=afterok:12", "#SBATCH --requeue", "#SBATCH --mail-type=END", "#SBATCH --signal=B:USR1@120",
        "module load cuda/12.4 || exit 1", "ulimit -l unlimited", "export NCCL_DEBUG=INFO",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert 'export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-ib0}"' in text
    assert "--cpus-per-task=96 --cpu-bind=none" in text, "srun does not take the cores over from sbatch"
    assert text == script(made), "pure"
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_job_of_several_nodes_outlives_a_lost_one_and_asks_for_spare_ones() -> None:
    made = config()
    made.launch.slurm.spare_nodes = 2
    lines = script(made).splitlines()
    assert "#SBATCH --nodes=4" in lines and "#SBATCH --no-kill" in lines
    made.launch.slurm.min_nodes = 1
    assert "#SBATCH --nodes=1-4" in script(made).splitlines()
    made.launch.restart.in_place = False
    assert "#SBATCH --no-kill" not in script(made).splitlines()
    alone = config()
    alone.launch.nodes = 1
    assert "#SBATCH --no-kill" not in script(alone).splitlines()


def test_containers() -> None:
    pyxis = config()
    pyxis.launch.slurm.container.kind, pyxis.launch.slurm.container.image = "pyxis", "nvcr.io#nvidia/pytorch:25.09-py3"
    pyxis.launch.slurm.container.mounts = ["/data:/data"]
    text = script(pyxis)
    assert "--container-image='nvcr.io#nvidia/pytorch:25.09-py3'" in text.replace("'--container-image=", "--container-image='")
    assert "--container-mounts=/data:/data" in text and f"python3 -P {STARTER} launch.slurm.node_agent" in text
    assert f"/usr/bin/python3 -P {STARTER} launch.slurm.batch_step" in text, "the batch step stays on the host"
    apptainer = config()
    apptainer.launch.slurm.container.kind, apptainer.launch.slurm.container.image = "apptainer", "/images/a b.sif"
    assert "  apptainer exec --nv '/images/a b.sif' \\\n" in script(apptainer)
    apptainer.launch.slurm.container.image = None
    assert [problem.path for problem in check_config(apptainer).problems if "container" in problem.path] == [
        "launch.slurm.container.image"
    ]


def hostile(payload: str) -> Config:
    """The payload in every string of the launch section and of the names around it."""
    made = config()
    text_fields = [name for name, value in vars(made.launch.slurm).items() if value is None or isinstance(value, str)]
    for name in text_fields:
        if name not in ("cpus_per_task", "min_nodes"):
            setattr(made.launch.slurm, name, payload)
    made.launch.slurm.modules = made.launch.slurm.srun_args = [payload]
    made.launch.slurm.extra = [f"--comment={payload}"]
    made.launch.slurm.container.kind, made.launch.slurm.container.image = "apptainer", payload
    made.launch.slurm.container.mounts = made.launch.slurm.container.args = [payload]
    made.launch.slurm.container.python = payload
    made.launch.env = {"A": payload}
    made.run.dir = f"runs/{payload}"
    return made


@pytest.mark.parametrize(
    ("environ", "value"),
    [({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "a"}, "a"), ({"PYTORCH_ALLOC_CONF": "b"}, "b")],
)
def test_the_allocators_default_gives_way_to_both_of_its_names(environ: dict[str, str], value: str) -> None:
    made = config()
    made.cluster.gpu = "H100-SXM-80GB"
    line = next(line for line in script(made).splitlines() if line.startswith("export PYTORCH_CUDA_ALLOC_CONF="))
    words = ["bash", "-c", f"{line}\necho $PYTORCH_CUDA_ALLOC_CONF"]
    assert subprocess.run(words, env=environ, capture_output=True, text=True, check=True).stdout.strip() == value


@pytest.mark.parametrize(
    "payload",
    ['"; touch canary; "', "'; touch canary; '", "$(touch canary)", "`touch canary`", "a && touch canary #", "\\", "$HOME"],
)
def test_no_string_is_a_command(payload: str, tmp_path: Path) -> None:
    made = hostile(payload)
    text = script(made, tmp_path)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    # `module` fails and would end the script before the rest is reached.
    runs = f"module() {{ :; }}\n{text}"
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", "-c", runs], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert not list(tmp_path.rglob("canary"))
    assert done.returncode != 0, "a Python of that name does not exist"
    options = [shlex.split(line)[0] for line in sbatch_lines(made, folder_of(made)) if line.startswith("--partition")]
    assert options == [f"--partition={payload}"]
    assert from_yaml_text(to_yaml(made)).launch.env == {"A": payload}


def test_line_breaks_are_refused_by_name() -> None:
    made = config(partition="gpu\n#SBATCH --uid=0", extra=["--a\nrm -rf ~", "no dash"])
    found = {problem.path for problem in check_config(made).problems}
    assert {"launch.slurm.partition", "launch.slurm.extra"} <= found
    made = config()
    made.cluster.interface = "ib0; rm"
    assert "cluster.interface" in {problem.path for problem in check_config(made).problems}


def test_a_prologue_must_be_whole() -> None:
    (problem,) = check_slurm(config(prologue=["ulimit -n 1024", '"; rm -rf ~']))
    assert problem.path == "launch.slurm.prologue[1]" and "bash says" in problem.rule
    assert check_slurm(config(prologue=["if true; then\n  echo yes\nfi"])) == []


def test_a_signal_during_the_prologue_is_kept_for_the_batch_step(tmp_path: Path) -> None:
    """By default it would end the script, and with it the run."""
    shows = tmp_path / "python"
    shows.write_text('#!/bin/sh\necho "signalled: $PHALANX_SIGNALLED"; kill -USR1 $$; echo alive\n')
    shows.chmod(0o700)
    for signalled, command in (("USR1", "kill -USR1 $$"), ("", "true")):
        text = script(config(prologue=[command], python=str(shows)), tmp_path)
        # A requeued or resubmitted script may have been given the variable.
        env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "PHALANX_SIGNALLED": "USR1"}
        done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.stdout == f"signalled: {signalled}\nalive\n", done


LMOD = Path("/usr/share/lmod/lmod/init/bash")


@pytest.mark.prove
def test_lmods_own_scripts_read_unset_variables_as_they_like(tmp_path: Path) -> None:
    if not LMOD.exists():
        pytest.skip("not installed: lmod (make slurm-extras)")
    (tmp_path / "compiler.lua").write_text('setenv("COMPILER", "13.2")\n')
    shows = tmp_path / "python"
    shows.write_text("#!/bin/sh\necho $COMPILER\n")
    shows.chmod(0o700)
    starts = [f". {LMOD}", f"module use {tmp_path}"]
    for made, code, said in (
        (config(prologue=[*starts, "module load compiler"], python=str(shows)), 0, "13.2\n"),
        (config(prologue=[*starts, "module load absent || exit 7"], python=str(shows)), 7, ""),
        (config(modules=["compiler"], python=str(shows)), 0, "13.2\n"),
        (config(modules=["absent"], python=str(shows)), 1, ""),
    ):
        # A login shell's profile makes `module` known, as BASH_ENV does here.
        env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "BASH_ENV": str(LMOD), "MODULEPATH": str(tmp_path)}
        done = subprocess.run(
            ["bash", "-c", script(made, tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (code, said), done


def test_fewer_nodes_only_where_the_layout_fits() -> None:
    made = config(min_nodes=1)
    made.launch.nodes, made.launch.processes_per_node, made.batch.global_batch_seqs = 8, 2, 16
    made.parallel.tensor = 4
    assert sizes_of(made) == [2, 4, 8], "tensor 4 needs two nodes, 16 sequences divide by 1, 2 and 4 replicas"
    assert "#SBATCH --nodes=2-8" in script_of(made, Path("/work"))
    made.launch.slurm.min_nodes = None
    assert sizes_of(made) == [8]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("2:30:15", 9015),
        ("1-0", 86400),
        ("1-12", 129600),
        ("1-2:03:04", 93784),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


def test_a_limit_that_leaves_no_time_to_train_is_refused() -> None:
    (problem,) = [p for p in check_config(config(time="4")).problems if p.path == "launch.slurm.time"]
    assert problem.got == "4" and "stop_before_s = 120" in problem.rule
    assert not [p for p in check_config(config(time="5")).problems if p.path == "launch.slurm.time"]


@pytest.mark.timeout(30)
def test_a_refusal_for_good_is_not_asked_for_again() -> None:
    """The job would hold its nodes meanwhile."""
    says = "echo 'Requested operation is presently disabled for job 7' >&2; exit 1"
    with pytest.raises(SchedulerError, match="presently disabled"):
        call_again(["bash", "-c", says], 600)


@pytest.mark.parametrize(("name", "says"), [("a\\b", "no backslash"), ("a{nodes}", "holds {nodes}"), ("{port}", "holds {port}")])
def test_a_run_folder_that_sbatch_or_the_batch_step_would_rewrite_is_refused(name: str, says: str) -> None:
    made = config()
    made.run.dir = f"runs/{name}"
    (problem,) = check_slurm(made)
    assert problem.path == "run.dir" and says in problem.rule
    made.run.dir = "runs/a {b} 'c' \"d\" ü $e %j"
    assert check_slurm(made) == []
