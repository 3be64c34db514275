"""plan, launch and status of a ladder. In: the command's name and words, of which the first names a ladder. Out: an exit code.

Exit codes: 0 done, 1 a run broke, 2 the input is bad, 130 stopped. Torch-free.
"""

from __future__ import annotations

import argparse
import json
import sys

from configs.errors import ConfigError, Problem, json_value
from launch.status_watch import terminal_columns, watch
from tools.ladder.bill import bill_text, price, total
from tools.ladder.ladder_file import Ladder, read_ladder
from tools.ladder.observe import law_of
from tools.ladder.scaling import ScalingLaw, law_text
from tools.ladder.start import check_points, run_points, submit_points
from tools.ladder.state import PointState, read_states, states_json, states_text

WATCH_S = 5.0


def main(argv: list[str]) -> int:
    """Run a command line whose first word is plan, launch or status. Raises ConfigError if the input is bad."""
    commands = {"plan": _plan, "launch": _launch, "status": _status}
    return commands[argv[0]](argv[1:])


def _parser(command: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"phalanx {command}", description=text)
    parser.add_argument("ladder", metavar="LADDER", help="a YAML file with a section `ladder`, or the folder of a launched one")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values of every point; they win over the file's")
    parser.add_argument("--calibrate", metavar="RUN_DIR", help="scale by this measured run of the same kind of machine")


def _plan(words: list[str]) -> int:
    parser = _parser("plan", "Memory, time and cost of every point of a ladder, and of all together.")
    _add_overrides(parser)
    args = parser.parse_intermixed_args(words)
    prices = price(read_ladder(args.ladder).with_words(args.overrides).load(), args.calibrate)
    if args.json:
        print(json.dumps({"points": [found.as_dict() for found in prices], "total": total(prices)}))
    else:
        print(bill_text(prices))
    return 0


def _launch(words: list[str]) -> int:
    parser = _parser("launch", "Start every point of a ladder that has not finished, after showing what they take.")
    _add_overrides(parser)
    parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument("--dry-run", action="store_true", help="check every point and show what they take; start nothing")
    args = parser.parse_intermixed_args(words)
    ladder = read_ladder(args.ladder).with_words(args.overrides)
    out = sys.stderr if args.json else sys.stdout
    loaded, states = ladder.load(), read_states(ladder)
    wanted, code = check_points(loaded, states), 0
    if not wanted:
        print(f"nothing to start: {len(states)} points have finished or are live", file=out)
    else:
        print(bill_text(price(wanted, args.calibrate)), file=out)
        if args.dry_run or not (args.yes or _agreed(ladder, len(wanted))):
            return 0
        ladder.write()
        on_slurm = wanted[0][1].config.launch.target == "slurm"
        code = submit_points(ladder, wanted, states, out) if on_slurm else run_points(ladder, wanted, out)
        print(f"status   phalanx status {ladder.folder}\nreport   phalanx report {ladder.folder}", file=out)
    if args.json:
        print(json.dumps(json_value(states_json(ladder, read_states(ladder)))))
    return code


def _agreed(ladder: Ladder, number: int) -> bool:
    if not sys.stdin.isatty():
        rule = "a launch of several runs asks first, and here nobody can answer"
        raise ConfigError(Problem("--yes", str(ladder.folder), rule, "look at the bill above, then add --yes"))
    return input(f"start {number} runs in {ladder.folder}? [y/N] ").strip().lower() in ("y", "yes")


def _status(words: list[str]) -> int:
    parser = _parser("status", "How the points of a ladder stand; when enough have finished, the scaling law of their losses.")
    parser.add_argument("--watch", action="store_true", help=f"again every {WATCH_S:g} s, until all are over")
    args = parser.parse_args(words)
    ladder = read_ladder(args.ladder)

    def look(columns: int | None) -> tuple[str, bool]:
        """(the text, whether it may still change)."""
        states = read_states(ladder)
        law, _ = law_of(ladder, states)
        if args.json:
            scaling = law.as_dict() if isinstance(law, ScalingLaw) else {"form": None, "why": law}
            return json.dumps(json_value(states_json(ladder, states) | {"scaling": scaling})), _live(states)
        return "\n".join([states_text(ladder, states, columns), law_text(law)]), _live(states)

    if args.watch:
        watch(look, WATCH_S, sys.stdout, redraw=not args.json)
    else:
        print(look(terminal_columns(sys.stdout))[0])
    return 0


def _live(states: list[PointState]) -> bool:
    return any(state.status.live for state in states)
