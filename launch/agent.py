"""torchrun's own agent, in this process. In: torchrun's arguments. Out: the ranks, and torchrun's exit code.

The module is imported by launch/torchrun.py after the environment has been cleaned, because it imports torch.
"""

from __future__ import annotations

import os

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import record

from launch.fork_server import report_killed_server, run_program, start_fork_server
from launch.local.scratch import scratch_folder
from launch.standby import WAITS, wait_for_attempt
from parallel.compat.torch_agent import ends_from_exit_codes, program_function


def main() -> None:
    """Run torchrun with the arguments of this process. Raises torch's ChildFailedError if a rank fails."""
    args = torchrun.parse_args(None)
    if not args.run_path:
        record(torchrun.run)(args)
        return
    if WAITS in os.environ:
        wait_for_attempt(args.training_script, args.training_script_args)
        args = torchrun.parse_args(None)
    with scratch_folder("fork", in_memory=True) as folder, program_function(run_program), ends_from_exit_codes():
        server = start_fork_server(folder, args.training_script, args.training_script_args)
        try:
            record(torchrun.run)(args)
        finally:
            report_killed_server(server)
