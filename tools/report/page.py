"""A document as one HTML page. In: a JSON document. Out: the bytes of a page that opens from a disk and asks no other host.

The page is a frame, a style, plotly's script and ours (tools/report/page/). The document stands in it as data, where no text of
it can end the element that holds it. Our script only makes text nodes of it. The page's policy allows the scripts with the hashes
of these two and no others, so that a script in a run's strings would not run even if it came into the page.

Torch-free.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem

_HERE = Path(__file__).resolve().parent / "page"
_SCRIPTS = ("base.js", "curves.js", "run.js", "tasks.js", "compare.js", "ladder.js", "plan.js", "start.js")
_POLICY = (
    "default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; connect-src {connect}; "
    "base-uri 'none'; form-action 'none'"
)


@cache
def plotly_script() -> str:
    """plotly.js as the Python package brings it along; the package itself is not imported. Raises ConfigError without it."""
    found = find_spec("plotly")
    script = Path(found.origin).parent / "package_data" / "plotly.min.js" if found and found.origin else None
    if script is None or not script.exists():
        rule = "the page's charts need the package plotly, version 5 or newer, which is not installed here"
        raise ConfigError(Problem("plotly", "not found", rule, "pip install 'phalanx[report]'"))
    return script.read_text(encoding="utf-8")


@cache
def _parts() -> tuple[str, str, str, str]:
    """(frame, style, our script, hashes of both scripts as the policy names them)."""
    script = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in (plotly_script(), script))
    return (_HERE / "page.html").read_text(encoding="utf-8"), (_HERE / "page.css").read_text(encoding="utf-8"), script, hashes


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def as_data(document: dict[str, Any]) -> str:
    """The document as JSON that may stand inside a script element. Raises ValueError for NaN and infinity."""
    return json.dumps(document, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def policy(live: bool) -> str:
    """The Content-Security-Policy. `live`: the page may ask its own server for more."""
    return _POLICY.format(hashes=_parts()[3], connect="'self'" if live else "'none'")


def make_page(document: dict[str, Any], title: str, live: bool = False) -> bytes:
    """The page. Raises ConfigError where plotly is missing."""
    frame, style, script, _ = _parts()
    fields = {
        "title": html.escape(title),
        "policy": html.escape(policy(live)),
        "style": style,
        "data": as_data(document),
        "plotly": plotly_script(),
        "script": script,
    }
    head, *rest = frame.split("{{")
    pieces = [head]
    for piece in rest:
        name, _, after = piece.partition("}}")
        pieces += [fields[name], after]
    return "".join(pieces).encode()
