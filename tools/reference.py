"""The parts of the documentation that the code itself knows: keys, rules, tables. In: nothing. Out: Markdown.

`make docs` puts them where a page has `<!-- generate: NAME -->`, so that they can't go stale.

Torch-free.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from configs.fields import KeyRule
from configs.keys import Key, keys_of
from configs.schema import Config
from parallel.compat import index as compat_index
from parallel.legality import zero_table
from parallel.legality.rules import LegalityRule
from parallel.legality.verdict import NOTICE_RULES, PROBLEM_RULES
from pretrain.run import events
from pretrain.run.folder import EXIT_BAD_INPUT, EXIT_CODE

KILLS = Path(__file__).resolve().parents[1] / "docs" / "assets" / "kills.json"
MARKER = re.compile(r"^<!-- generate: ([a-z ]+) -->$", re.MULTILINE)


def fill(markdown: str) -> str:
    """The page with every marker replaced. Raises KeyError for a name that is not in GENERATORS."""
    return MARKER.sub(lambda match: GENERATORS[match[1]](), markdown)


def config_reference() -> str:
    """Every key of the schema with type, default, allowed values and meaning, a table for each section."""
    return "\n\n".join(_section(Config, "", 2))


def _section(section: type, prefix: str, level: int) -> Iterable[str]:
    keys = keys_of(section, prefix)
    plain = [(item, keys[item.name]) for item in fields(section) if keys[item.name].kind != "section"]
    if plain:
        rows = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
        rows += [_row(item, key) for item, key in plain]
        yield "\n".join(rows)
    for item in fields(section):
        key = keys[item.name]
        if key.kind == "section":
            yield f"{'#' * min(level, 4)} `{key.path}`"
            yield from _section(key.type, f"{key.path}.", level + 1)
        elif key.kind == "list" and is_dataclass(key.type):
            yield f"{'#' * min(level, 4)} Items of `{key.path}`"
            yield from _section(key.type, f"{key.path}[].", level + 1)


def _row(item: Field[Any], key: Key) -> str:
    allowed = _allowed(item.metadata.get("rule"))
    meaning = str(item.metadata.get("doc", ""))
    meaning += f" Allowed: {allowed}." if allowed else ""
    cells = (f"`{key.path}`", key.words, _default(item), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _default(item: Field[Any]) -> str:
    if item.default is not MISSING:
        if item.default == "":
            return "empty"
        return "`null`" if item.default is None else f"`{item.default}`".replace("True", "true").replace("False", "false")
    if item.default_factory is MISSING:
        return "required"
    made = item.default_factory()
    return f"`{made}`" if made else "empty"


def _allowed(rule: KeyRule | None) -> str:
    if rule is None:
        return ""
    if rule.choices:
        return ", ".join(f"`{choice}`" for choice in rule.choices)
    bounds = ((rule.low, "at least"), (rule.above, "more than"), (rule.high, "at most"))
    return ", ".join(f"{words} {bound:g}" for bound, words in bounds if bound is not None)


def rules_reference() -> str:
    """Each rule between keys, in the order in which `phalanx check` asks them."""
    return _rules(PROBLEM_RULES)


def notices_reference() -> str:
    """Each remark on what is legal but worth knowing."""
    return _rules(NOTICE_RULES)


def _rules(rules: Iterable[LegalityRule[Any]]) -> str:
    rows = ["| Rule | What it says | Keys |", "|---|---|---|"]
    for rule in rules:
        text = " ".join((rule.check.__doc__ or "").split()).replace("|", "\\|")
        rows.append(f"| `{rule.name}` | {text} | {', '.join(f'`{key}`' for key in rule.reads)} |")
    return "\n".join(rows)


def exit_codes() -> str:
    """What commands and ranks return."""
    meanings = {
        EXIT_CODE["finished"]: "finished, or the command did what was asked",
        EXIT_CODE["failed"]: "failed: something broke",
        EXIT_BAD_INPUT: "bad input: a config, a file or an argument must change first",
        EXIT_CODE["diverged"]: "diverged: loss or gradients are no longer finite, or the loss spiked as the config forbids",
        EXIT_CODE["preempted"]: "preempted: saved; the same command goes on",
        EXIT_CODE["stopped"]: "stopped by a person (Ctrl-C, `phalanx cancel`)",
    }
    return "\n".join(["| Exit code | Meaning |", "|---|---|", *(f"| {code} | {text} |" for code, text in meanings.items())])


def kills() -> str:
    """What came of the campaign of tests/chaos, from the report of its last run: a count for each way and place."""
    rows = json.loads(KILLS.read_text())["rows"]
    places = {(where, again): f"{where}{', in place' * again}" for where in ("local", "slurm") for again in (False, True)}
    came = Counter((row["way"], row["where"], row["in_place"]) for row in rows)
    lost = Counter(row["way"] for row in rows if row["result"] == "lost")
    table = [f"| What happened | {' | '.join(places.values())} | lost |", f"|---|{'---|' * (len(places) + 1)}"]
    for way in sorted({row["way"] for row in rows}):
        table.append(f"| {way} | {' | '.join(str(came[way, *place] or '') for place in places)} | {lost[way]} |")
    runs = len({(row["where"], row["seed"]) for row in rows})
    commits = Counter(row["commit"] for row in rows)
    code = ", ".join(f"{commit}: {number}" for commit, number in sorted(commits.items(), key=lambda pair: -pair[1]))
    warm = len({(row["where"], row["seed"], row["attempt"]) for row in rows if row.get("standby")})
    standby = f"Under Slurm, {warm} attempts after a kill took the waiting step."
    words = f"{len(rows)} kills in {runs} runs, {lost.total()} lost. {standby} Kills by the commit of the code: {code}."
    return "\n".join([words, "", *table])


GENERATORS: dict[str, Callable[[], str]] = {
    "config reference": config_reference,
    "engine table": zero_table.markdown,
    "rules": rules_reference,
    "notices": notices_reference,
    "events": events.markdown,
    "library guards": compat_index.markdown,
    "exit codes": exit_codes,
    "kills": kills,
}
