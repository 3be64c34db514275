"""The rehearsal's other interpreter: trains what it is asked for, under its own libraries.

In: one JSON line on stdin for each layout, {"config": YAML, "ranks": N, "steps": N, "results": path}. Out: one JSON line on
stdout for each, {} or {"error": traceback}; before them one line about itself. Results are files (result_files.py).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from configs.errors import report
from configs.load import from_yaml_text
from parallel.compat.supported import engine_problems
from parallel.legality.verdict import check_config
from pretrain.run.process import die_with_parent, importing
from tools.rehearse.library_side import this_side

with importing():
    from tools.rehearse.local_ranks import RankFailed, run_ranks
    from tools.rehearse.result_files import save_results
    from tools.rehearse.train_rank import train


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Train one layout; returns the answer's line."""
    config = from_yaml_text(request["config"])
    if problems := [*check_config(config).problems, *engine_problems(config)]:
        return {"error": report(problems)}
    try:
        ranks = run_ranks(request["ranks"], train, config, request["steps"])
    except RankFailed as error:
        return {"error": str(error)}
    save_results(ranks, Path(request["results"]))
    return {}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until stdin ends."""
    print(json.dumps(this_side().as_dict()), file=answers, flush=True)
    for line in requests:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    die_with_parent()
    # Libraries print to stdout: the answers keep a descriptor of their own, and the ranks do not inherit it.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, own)
