"""The command `phalanx doctor`. In: its command-line arguments. Out: verdicts and an exit code.

Exit code 0: fit to train. 1: a node failed or is silent. 2: bad input.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from configs.errors import ConfigError, Problem
from configs.fields import check_keys
from configs.load import load_config
from configs.schema import Config
from launch.doctor import slurm
from launch.doctor.gpu_facts import gpu_facts
from launch.doctor.local import check_here
from launch.doctor.report import CheckupReport, as_document, describe, judge
from launch.doctor.request import NODES, NONCE, CheckupRequest, ProbeSizes, make_request
from launch.doctor.results import read_hostnames, read_results
from launch.slurm.script import ScriptLocation
from launch.slurm.submit import check_slurm
from parallel.legality.slurm import RULES
from pretrain.run.files import storage_problem, write_atomically, write_json
from pretrain.run.folder import check_run_folder, folder_of
from pretrain.run.process import node_name

TIMEOUT_S = 1800.0
QUICK = ProbeSizes(disk_mib=8, network_mib=(1, 8))
_HELP = """\
Is this machine, or each node of a Slurm allocation, fit to train? Every node gets a verdict (ok, warn, fail). Every problem
comes with its rule and a fix.

Without CONFIG: this machine and the working folder. With one: its run folder, processes and cluster section; under
launch.target=slurm a job of at most 10 minutes on launch.nodes nodes, with the modules, environment and container of the run.
"""
_EPILOG = """\
looked at: Python, torch and package versions; GPUs, their drivers, memory errors and throttling; memory, /dev/shm, limits;
the run folder's room and speed, and that all nodes share it; data files; the network interface; clocks. Then measured with
the run's own ranks: a fixed matrix product, all-reduce inside each node, between neighbours in a ring, and over all ranks
(bus bandwidth as NCCL's tests define it), against cluster.network_gbit_s and between the nodes.

examples:
  phalanx doctor
  phalanx doctor my_run.yaml launch.target=slurm launch.nodes=4
  phalanx doctor my_run.yaml launch.slurm.nodelist=node[17-20] --json

exit codes: 0 fit to train, warnings allowed; 1 a node failed, or the job did not run; 2 bad input.
"""


def main(argv: list[str]) -> int:
    """Run `phalanx doctor`. Returns the exit code. Raises ConfigError if the input is bad."""
    parser = argparse.ArgumentParser(
        prog="phalanx doctor", description=_HELP, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a config file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config values that win over the file's")
    parser.add_argument("--local", action="store_true", help="this machine only, whatever launch.target says")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="longest wait for the job (default 1800 s)")
    parser.add_argument("--quick", action="store_true", help="move less: rougher figures of disk and network")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    found = parser.parse_intermixed_args(argv)
    config = _config(found.config, found.overrides)
    on_slurm = config.launch.target == "slurm" and not found.local
    if problems := _problems(config, found.timeout, on_slurm):
        raise ConfigError(problems)
    sizes = QUICK if found.quick else ProbeSizes()
    if found.dry_run and on_slurm:
        text = _dry_run(config, sizes)
        print(json.dumps({"script": text}, indent=2) if found.json else text, end="")
        return 0
    checkup = _on_slurm(config, sizes, found.timeout) if on_slurm else _here(config, sizes, named=found.config is not None)
    print(json.dumps(as_document(checkup), indent=2) if found.json else describe(checkup))
    return 0 if checkup.ok else 1


def _config(source: str | None, overrides: list[str]) -> Config:
    if source is None:
        return Config()
    if "=" in source and not Path(source).exists():
        raise ConfigError(Problem("CONFIG", source, "key=value words follow a CONFIG", f"phalanx doctor quickstart {source}"))
    return load_config(source, overrides).config


def _problems(config: Config, timeout_s: float, on_slurm: bool) -> list[Problem]:
    """Problems of the settings that the check-up itself needs. `phalanx check` examines the whole config."""
    problems = [found for found in check_keys(config) if found.path.startswith(("launch.", "cluster."))]
    bad = {found.path for found in problems}
    problems += [found for rule in RULES if rule.applies(bad) for found in rule.check(config)]
    if not timeout_s > 0:
        problems.append(Problem("--timeout", timeout_s, "must be more than 0 seconds", f"--timeout {TIMEOUT_S:g}"))
    return problems + (check_slurm(config) if on_slurm else [])


def _on_slurm(config: Config, sizes: ProbeSizes, timeout_s: float) -> CheckupReport:
    cwd, launch = Path.cwd(), config.launch
    folder = _new_folder(config, cwd)
    request = make_request(config, folder, cwd, launch.nodes, launch.processes_per_node, sizes)
    _prepare(request)
    number = slurm.submit(config, request, ScriptLocation(folder, cwd, sys.executable))
    print(f"job {number}: {folder}", file=sys.stderr)
    ended = slurm.wait(number, folder, timeout_s, launch.slurm.partition, sys.stderr)
    expected = read_hostnames(folder)
    job = {"number": number, "state": ended.job.state, "reason": ended.job.reason}
    results = read_results(folder, request, expected)
    if ended.error and not expected:
        # The job never began, so the missing network measurement is not a second error.
        results = replace(results, network_error="")
    return _with_verdict_file(judge(results, request, expected, job, ended.error))


def _here(config: Config, sizes: ProbeSizes, named: bool) -> CheckupReport:
    cwd, node = Path.cwd(), node_name(os.environ)
    if named:
        folder, processes = _new_folder(config, cwd), config.launch.processes_per_node
    else:
        # Without a config, two ranks are enough to show that ranks can communicate.
        folder, processes = _temporary_folder(cwd), len(gpu_facts()["gpus"]) or 2
    try:
        request = make_request(config, folder, cwd, 1, processes, sizes)
        _prepare(request)
        check_here(config, request, node, os.environ)
        checkup = judge(read_results(folder, request, [node]), request, [node])
    except OSError as error:
        raise ConfigError(storage_problem("run.dir", folder, error)) from error
    finally:
        if not named:
            shutil.rmtree(folder, ignore_errors=True)
    return _with_verdict_file(checkup) if named else replace(checkup, folder="")


def _with_verdict_file(checkup: CheckupReport) -> CheckupReport:
    """Write the verdict into the check-up's folder, beside the facts. Returns the check-up."""
    try:
        write_json(Path(checkup.folder) / "verdict.json", as_document(checkup))
    except OSError as error:
        raise ConfigError(storage_problem("run.dir", checkup.folder, error)) from error
    return checkup


def _dry_run(config: Config, sizes: ProbeSizes) -> str:
    cwd, launch = Path.cwd(), config.launch
    folder = _folder(config, cwd, 1)
    request = make_request(config, folder, cwd, launch.nodes, launch.processes_per_node, sizes)
    return slurm.render(config, request, ScriptLocation(folder, cwd, sys.executable))


def _folder(config: Config, cwd: Path, number: int) -> Path:
    return (cwd / folder_of(config).path / "doctor" / f"{number:04d}").absolute()


def _new_folder(config: Config, cwd: Path) -> Path:
    """RUN_DIR/doctor/0001 or the next free number. Raises ConfigError: a folder of something else, or not writable."""
    if problems := check_run_folder(folder_of(config)):
        raise ConfigError(problems)
    number = 1
    while True:
        folder = _folder(config, cwd, number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            raise ConfigError(storage_problem("run.dir", folder, error)) from error
        return folder


def _temporary_folder(cwd: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=".phalanx-doctor-", dir=cwd))
    except OSError as error:
        raise ConfigError(storage_problem("working folder", cwd, error)) from error


def _prepare(request: CheckupRequest) -> None:
    folder = Path(request.folder)
    try:
        (folder / NODES).mkdir()
        write_atomically(folder / NONCE, request.nonce)
        write_atomically(folder / "request.json", request.to_json())
    except OSError as error:
        raise ConfigError(storage_problem("run.dir", folder, error)) from error
