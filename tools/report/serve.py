"""The page on the loopback interface, following living runs. In: a function that reads the runs. Out: a server, until Ctrl-C.

It answers GET of the page and of its data and nothing else, to this machine only. A request whose Host is another name is
refused, so that a web page elsewhere can't read the run through the visitor's browser. It writes nothing.

Torch-free.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from configs.errors import ConfigError, Problem
from tools.report.page import as_data, make_page, policy

HOST = "127.0.0.1"
# In seconds: the runs' files are read at most so often, however many pages are open.
_EVERY_S = 1.0

Read = Callable[[], dict[str, Any]]


class LiveDocument:
    """The newest document and its version, which changes when something of the runs has changed."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._at_s = 0.0
        self._document: dict[str, Any] = {}
        self._content = ""
        self.version = 0

    def newest(self) -> tuple[dict[str, Any], int]:
        """(the document, its version). Raises ConfigError when a run can't be read."""
        with self._lock:
            if time.monotonic() - self._at_s >= _EVERY_S:
                found = self._read()
                content = _without_ages(found)
                if content != self._content:
                    self._content, self.version = content, self.version + 1
                self._document, self._at_s = found, time.monotonic()
            return self._document, self.version


def _without_ages(document: dict[str, Any]) -> str:
    """What has to change before a page is told: ages change by themselves."""
    runs = [{**run, "status": {**run["status"], "age_s": None, "last_row_age_s": None}} for run in document["runs"]]
    return json.dumps({**document, "made": None, "runs": runs})


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "phalanx", ""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, PageServer), f"made for PageServer, not {server}"
        if self.headers.get("Host", "") not in server.hosts:
            self._answer(403, b"only for this machine\n", "text/plain")
            return
        url = urlsplit(self.path)
        try:
            document, version = server.live.newest()
        except ConfigError as error:
            self._answer(500, f"{error}\n".encode(), "text/plain; charset=utf-8")
            return
        if url.path == "/":
            page = make_page({**document, "version": version, "live": True}, server.title, live=True)
            self._answer(200, page, "text/html; charset=utf-8")
        elif url.path == "/data":
            if parse_qs(url.query).get("version") == [str(version)]:
                self._answer(204, b"", "application/json")
            else:
                self._answer(200, as_data({**document, "version": version, "live": True}).encode(), "application/json")
        else:
            self._answer(404, b"not found\n", "text/plain")

    def _answer(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", policy(live=True) + "; frame-ancestors 'none'")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


class PageServer(ThreadingHTTPServer):
    """Serves the page of `live` at `url`."""

    daemon_threads = True

    def __init__(self, live: LiveDocument, title: str, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.live, self.title = live, title
        number = self.server_address[1]
        self.hosts = (f"{HOST}:{number}", f"localhost:{number}")
        self.url = f"http://{HOST}:{number}/"


def serve(read: Read, title: str, port: int) -> int:
    """Serve until Ctrl-C. Raises ConfigError when the port can't be had."""
    live = LiveDocument(read)
    live.newest()
    try:
        server = PageServer(live, title, port)
    except (OSError, OverflowError) as error:
        rule = f"must be a free port of {HOST} ({error})"
        raise ConfigError(Problem("--serve", port, rule, "name another port, or none for a free one")) from error
    with server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
