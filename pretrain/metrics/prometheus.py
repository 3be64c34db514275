"""The newest step as Prometheus text at http://127.0.0.1:PORT/metrics. In: rows. Out: answers of a thread of rank 0.

Torch-free.
"""

from __future__ import annotations

import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pretrain.metrics.sinks import NullSink, Sink
from pretrain.metrics.tensorboard_store import is_number
from pretrain.run.folder import Outcome

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class PrometheusSink:
    """Serves the newest row on the loopback interface. Only processes of this machine reach it."""

    def __init__(self, run: str, port: int) -> None:
        self._run, self._text = run, ""
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = sink._text.encode() if self.path == "/metrics" else b""
                self.send_response(200 if self.path == "/metrics" else 404)
                self.send_header("Content-Type", _CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    def write(self, row: dict[str, Any]) -> None:
        self._text = as_text(self._run, row)

    def show_message(self, text: str) -> None:
        return

    def close(self, outcome: Outcome | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def as_text(run: str, row: dict[str, Any]) -> str:
    """A row in Prometheus' text format 0.0.4: gauges `phalanx_KEY`; what follows a slash in the key is the label `part`."""
    lines, before = [], ""
    for key in sorted(row):
        if not is_number(row[key]):
            continue
        name, _, part = key.partition("/")
        name = "phalanx_" + re.sub(r"\W", "_", name, flags=re.ASCII)
        if name != before:
            lines.append(f"# TYPE {name} gauge")
            before = name
        labels = f'run="{_escaped(run)}"' + (f',part="{_escaped(part)}"' if part else "")
        lines.append(f"{name}{{{labels}}} {_number(float(row[key]))}")
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(str(value), repr(value))


def make_prometheus_sink(run: str, port: int | None) -> Sink:
    """The sink at metrics.prometheus_port, or a null sink without one. A port that is taken is one warning."""
    if port is None:
        return NullSink()
    try:
        return PrometheusSink(run, port)
    except OSError as error:
        print(f"phalanx: no Prometheus text at 127.0.0.1:{port}: {error.strerror or error}", file=sys.stderr, flush=True)
        return NullSink()
