"""What every rank runs: torchrun --nproc-per-node N pretrain/main.py --config FILE key=value …

config → layout → groups → model → engine → data → loop → outcome, one call a line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pretrain.run.beat import BEAT_DIR, BUILDING, READING, RESTORING
from pretrain.run.process import importing
from pretrain.run.heartbeat import Heartbeat
from pretrain.rank.process_setup import prepare, refusing_bad_input, run_rank
from pretrain.rank.stop_signals import StopSignals

SIGNALS = StopSignals(beat=Heartbeat(os.environ))
if __name__ == "__main__":
    # The imports below take seconds: signals, the rank's log and its parent's death are looked after before them.
    SIGNALS.install()
    prepare()
    SIGNALS.beat.start()

with importing(), refusing_bad_input():
    from configs.load import Loaded, load_config
    from parallel.groups import make_groups
    from parallel.layout import make_layout
    from parallel.runtime import start, stop
    from parallel.stages import make_chunks
    from pretrain.build import make_engine, make_model, make_run
    from pretrain.loop import train
    from pretrain.preflight.verdict import machine_problems, rank_problems
    from pretrain.session import Session
    from pretrain.rank.consensus import ask_machines, lead, refuse


def read_arguments(argv: Sequence[str]) -> Loaded:
    """--config FILE key=value …, as the launchers write it."""
    parser = argparse.ArgumentParser(prog="pretrain/main.py", description="One rank of a run; started by torchrun.")
    parser.add_argument("--config", required=True, metavar="CONFIG", help="a YAML file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values laid over the file's")
    args = parser.parse_intermixed_args(list(argv))
    return load_config(args.config, args.overrides)


def main(argv: Sequence[str], signals: StopSignals) -> int:
    """The whole attempt of one rank; returns the exit code of how it ended."""
    runtime = start(os.environ, is_watched=bool(os.environ.get(BEAT_DIR)))
    loaded = lead(lambda: read_arguments(argv))
    config = loaded.config
    lacking = ask_machines(runtime.local_rank, lambda: machine_problems(config, runtime.device.type))
    lead(lambda: refuse(rank_problems(config, lacking)))
    with Session(loaded, runtime) as session:
        if session.is_finished:
            return 0
        signals.beat.enter(BUILDING)
        layout = make_layout(config)
        chunks = make_chunks(
            config.model, layout.pipeline, layout.virtual_pipeline, session.vocab_size, config.parallel.pipeline_split
        )
        groups = make_groups(layout, config.run.seed)
        model = make_model(config, session.vocab_size, layout, chunks, groups, runtime.device)
        engine = make_engine(config, model, groups, runtime.device)
        signals.beat.enter(RESTORING)
        position = session.restore(engine)
        signals.beat.enter(READING)
        run = make_run(session, layout, groups, model, engine, position, signals)
        ended = train(run)
        signals.beat.end()
        code = session.finish(ended)
    stop()
    return code


if __name__ == "__main__":
    sys.exit(run_rank(lambda: main(sys.argv[1:], SIGNALS)))
