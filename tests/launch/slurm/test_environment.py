"""What reaches a job of the submitter's environment, and what its batch script does to it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from launch.slurm.environment import describe_removed, overruling_variables, query_environment, submission_environment
from launch.slurm.script import ScriptLocation, render
from pretrain.run.folder import folder_of
from tests.launch.slurm.test_script import config

IN_A_JOB = {
    "PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURMD_NODENAME": "node9", "SRUN_CPUS_PER_TASK": "4", "SLURM_EXPORT_ENV": "NONE",
    "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "proj", "PMI_RANK": "0",
}  # fmt: skip


def test_variables_of_another_job_stay_behind_and_those_of_the_site_pass() -> None:
    found = submission_environment(IN_A_JOB)
    assert found.kept == {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "proj"}
    assert "8 variables of Slurm job 7" in describe_removed(found) and "SLURM_CPU_BIND" in describe_removed(found)
    outside = {name: value for name, value in IN_A_JOB.items() if name != "SLURM_JOB_ID"}
    assert submission_environment(outside).kept == outside, "what a login shell sets is on purpose"
    assert describe_removed(submission_environment(outside)) == ""


def test_the_config_wins_over_sbatch_variables() -> None:
    """sbatch itself prefers its variables to the lines of the script."""
    environ = {"SBATCH_PARTITION": "debug", "SBATCH_ACCOUNT": "proj", "SBATCH_WAIT": "1", "SBATCH_EXPORT": "NONE"}
    assert overruling_variables(environ, ["partition"]) == ("SBATCH_PARTITION", "SBATCH_WAIT")
    assert overruling_variables(environ, []) == ("SBATCH_WAIT",)


def test_a_query_prints_what_we_parse() -> None:
    environ = {"SQUEUE_FORMAT": "%i", "SINFO_FORMAT": "%n", "SLURM_TIME_FORMAT": "relative", "SLURM_CONF": "x"}
    assert query_environment(environ) == {"SLURM_CONF": "x", "SLURM_TIME_FORMAT": "standard"}


def seen_by_the_batch_step(tmp_path: Path, environ: dict[str, str], *prologue: str) -> dict[str, str]:
    """The environment that a script hands to its Python, run by bash."""
    stub = tmp_path / "python"
    stub.write_text("#!/bin/bash\nenv\n")
    stub.chmod(0o700)
    made = config(prologue=list(prologue), mem="1G")
    made.launch.env = {"MARKER": "of the config"}
    text = render(made, folder_of(made), ScriptLocation(tmp_path / "job_0001", tmp_path, str(stub)))
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "8", "SLURM_JOB_NODELIST": "node1", **environ}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_a_script_submitted_by_hand_from_inside_a_job_drops_its_step_options(tmp_path: Path) -> None:
    leaked = {
        name: "1" for name in ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "SLURM_CPU_BIND", "SLURM_CPU_BIND_TYPE", "SLURM_NPROCS")
    }
    seen = seen_by_the_batch_step(tmp_path, {**leaked, "SLURM_EXPORT_ENV": "NONE", "SLURM_MPI_TYPE": "pmix"})
    assert not {*leaked, "SLURM_EXPORT_ENV"} & set(seen)
    assert (seen["SLURM_JOB_ID"], seen["SLURM_MPI_TYPE"], seen["MARKER"]) == ("8", "pmix", "of the config")
    assert seen_by_the_batch_step(tmp_path, {"SLURM_CPU_BIND": "none"})["SLURM_CPU_BIND"] == "none", "a site's own choice"


def test_a_prologue_may_read_unset_variables(tmp_path: Path) -> None:
    """conda's activation reads $PS1, Lmod's $LMOD_PATH, of a shell that has neither."""
    seen = seen_by_the_batch_step(tmp_path, {}, 'export ACTIVATED="$PS1$LMOD_PATH$CONDA_SHLVL yes"')
    assert seen["ACTIVATED"] == " yes"
