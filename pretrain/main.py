"""What every rank runs: torchrun --nproc-per-node N pretrain/main.py --config FILE key=value …

config → layout → groups → model → engine → data → loop → outcome, one call a line.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Started by its path: our packages come from here, and no room of pretrain/ shadows a library.
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "configs" / "own_packages.py"))

from pretrain.run.beat import BEAT_DIR, BUILDING, READING, RESTORING
from pretrain.run.process import IMPORTS_ONLY, importing
from pretrain.run.events import EventKind
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
    from parallel.compat.megatron_cpu import cuda_available
    from parallel.compat.torch_private import import_dynamo
    from parallel.groups import make_groups
    from parallel.layout import make_layout
    from parallel.runtime import start, stop
    from parallel.stages import make_chunks
    from pretrain.build import import_deepspeed, make_engine, make_model, make_training_data, make_training_run
    from pretrain.loop import train
    from pretrain.preflight.verdict import machine_problems, rank_problems
    from pretrain.records import open_records
    from pretrain.resume import restore_engine
    from pretrain.session import make_context, open_session
    from pretrain.rank.rank_zero import gather_machine_problems, run_on_rank_0, raise_problems


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
    loaded = run_on_rank_0(lambda: read_arguments(argv))
    config = loaded.config
    lacking = gather_machine_problems(runtime.local_rank, lambda: machine_problems(config, runtime.device.type))
    run_on_rank_0(lambda: raise_problems(rank_problems(config, lacking)))
    context = make_context(loaded, runtime)
    session = open_session(context)
    if session is None:
        return 0
    with session:
        signals.beat.enter(BUILDING)
        layout = make_layout(config)
        parallel = config.parallel
        chunks = make_chunks(config.model, layout.pipeline, layout.virtual_pipeline, context.vocab_size, parallel.pipeline_split)
        groups = make_groups(layout, config.run.seed)
        model = make_model(config, context.vocab_size, layout, chunks, groups, runtime.device)
        engine = make_engine(config, model, groups, runtime.device)
        signals.beat.enter(RESTORING)
        restored = restore_engine(session, engine)
        signals.beat.enter(READING)
        data = make_training_data(context, groups, restored)
        records = open_records(session, restored)
        run = make_training_run(session, layout, groups, model, engine, restored, data, records, signals)
        session.journal.write_event(EventKind.TRAINING, step=run.position.step + 1)
        ended = train(run)
        signals.beat.end()
        code = session.finish(ended, run.saver.newest)
    stop()
    return code


def import_the_rest(argv: Sequence[str]) -> None:
    """Import what a rank of this config needs later: in the process that ranks are forked from, they find it imported."""
    import_dynamo()
    if read_arguments(argv).config.zero.engine == "deepspeed":
        import_deepspeed("cuda" if cuda_available() else "cpu")


if __name__ == IMPORTS_ONLY:
    import_the_rest(sys.argv[1:])
if __name__ == "__main__":
    sys.exit(run_rank(lambda: main(sys.argv[1:], SIGNALS)))
