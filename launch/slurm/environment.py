"""Which variables reach Slurm's commands and jobs. In: an environment. Out: what is kept, and what was removed.

sbatch takes the submitter's environment along. Inside of salloc, srun or another batch job that environment describes the
other job, and srun reads some of those variables as its own options (SLURM_MEM_PER_CPU, SLURM_CPU_BIND): steps of the new
job then fail at once. What a site or a user sets outside of a job (SLURM_CONF, SBATCH_ACCOUNT) is kept.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Set by a site or a user on purpose, inside of a job too: where Slurm is, and how its commands talk.
SITE_VARIABLES = frozenset(
    {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_MPI_TYPE", "SLURM_TIME_FORMAT", "SLURM_DEBUG_FLAGS"}
)
# Any of these says that the environment is that of a job.
_JOB_IDS = ("SLURM_JOB_ID", "SLURM_JOBID")
# Variables of a job and of a step. SBATCH_CPU_BIND and SBATCH_MEM_BIND are set by Slurm in a job; other SBATCH_ variables
# are the user's own.
_JOB_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMI2_", "PMIX_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
# Variables that change what squeue, sinfo, sacct and scontrol print, or which rows they print.
_QUERY_PREFIXES = ("SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_")
# sbatch reads these before the #SBATCH lines of a script: config key → variables that would win over it.
SBATCH_VARIABLES: dict[str, tuple[str, ...]] = {
    "partition": ("SBATCH_PARTITION",),
    "account": ("SBATCH_ACCOUNT",),
    "qos": ("SBATCH_QOS",),
    "time": ("SBATCH_TIMELIMIT",),
    "constraint": ("SBATCH_CONSTRAINT",),
    "gres": ("SBATCH_GRES",),
    "gpus_per_node": ("SBATCH_GPUS_PER_NODE", "SBATCH_GPUS"),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "reservation": ("SBATCH_RESERVATION",),
}
# These contradict what every script of ours states: its name, output, signal, requeue, and one job instead of an array.
SBATCH_ALWAYS = (
    "SBATCH_JOB_NAME", "SBATCH_OUTPUT", "SBATCH_ERROR", "SBATCH_OPEN_MODE", "SBATCH_SIGNAL", "SBATCH_REQUEUE",
    "SBATCH_NO_REQUEUE", "SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_DISTRIBUTION",
)  # fmt: skip


@dataclass(frozen=True)
class SubmissionEnvironment:
    """`kept` is what sbatch gets. `removed` are the names of variables that describe the job `job_id`, sorted."""

    kept: dict[str, str]
    removed: tuple[str, ...]
    job_id: str


def submission_environment(environ: Mapping[str, str]) -> SubmissionEnvironment:
    """The environment of a submitter, without the job that the submitter runs in, if any."""
    job_id = next((environ[name] for name in _JOB_IDS if environ.get(name)), "")
    removed = [name for name in environ if job_id and name.startswith(_JOB_PREFIXES) and name not in SITE_VARIABLES]
    kept = {name: value for name, value in environ.items() if name not in removed}
    return SubmissionEnvironment(kept, tuple(sorted(removed)), job_id)


def describe_removed(found: SubmissionEnvironment) -> str:
    """A line for people, or an empty text if nothing was removed."""
    if not found.removed:
        return ""
    shown = ", ".join(found.removed[:4]) + (", …" if len(found.removed) > 4 else "")
    return f"{len(found.removed)} variables of Slurm job {found.job_id}, in which this command runs, are not passed on: {shown}"


def overruling_variables(environ: Mapping[str, str], stated: Iterable[str]) -> tuple[str, ...]:
    """The SBATCH_ variables in `environ` that would win over the script. `stated` are the keys of launch.slurm with a value."""
    names = {name for key in stated for name in SBATCH_VARIABLES.get(key, ())} | set(SBATCH_ALWAYS)
    return tuple(sorted(names & set(environ)))


def query_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command whose output is read: no variable that changes columns, rows or the form of times."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_QUERY_PREFIXES)}
    return {**kept, "SLURM_TIME_FORMAT": "standard"}
