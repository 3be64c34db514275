"""torchrun's own agent, in this process. In: torchrun's arguments. Out: the ranks, and torchrun's exit code.

The module is imported by launch/torchrun.py after the environment has been cleaned, because it imports torch.
"""

from __future__ import annotations

import sys

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import record

from launch.fork_server import import_for_ranks, report_killed_server, run_program, start_fork_server
from launch.local.scratch import scratch_folder
from parallel.compat.torch_agent import ends_from_exit_codes, program_function


def main() -> None:
    """Run torchrun with the arguments of this process. Raises torch's ChildFailedError if a rank fails."""
    args = torchrun.parse_args(None)
    if args.run_path and (why_not := import_for_ranks(args.training_script, args.training_script_args)):
        print(f"phalanx: each rank imports its libraries itself: {why_not}", file=sys.stderr, flush=True)
        args.run_path = False
    if not args.run_path:
        record(torchrun.run)(args)
        return
    with scratch_folder("fork", in_memory=True) as folder, program_function(run_program), ends_from_exit_codes():
        server = start_fork_server(folder)
        try:
            record(torchrun.run)(args)
        finally:
            report_killed_server(server)
