"""A W&B server on loopback, as much of it as a run needs, with switches for faults. In: HTTP. Out: `runs`, what it holds."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Of the form that wandb takes; the server lets anyone in.
KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StubRun:
    history: list[str] = field(default_factory=list)
    summary: str = "{}"
    config: str = "{}"
    started: bool = False
    exit_code: int | None = None

    def steps(self) -> list[int]:
        return [json.loads(line)["step"] for line in self.history]


class WandbStub:
    """Use as a context manager; `url` goes into WANDB_BASE_URL."""

    def __init__(self) -> None:
        self.runs: dict[str, StubRun] = {}
        self.status = 200
        # Of the requests that carry rows.
        self.stream_status = 200
        self.hang_s = 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def run(self, name: str) -> StubRun:
        return self.runs.setdefault(name, StubRun())

    def __enter__(self) -> WandbStub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def graphql(self, query: dict[str, Any], host: str) -> dict[str, Any]:
        """The `data` of one GraphQL request; {} for what a run can do without."""
        operation = query.get("operationName") or _operation(query["query"])
        variables = query.get("variables") or {}
        entity = {"id": "ent", "name": "ent"}
        project = {"id": "pid", "name": variables.get("project") or "p", "entity": entity}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "ServerInfo":
            return {"serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "latestLocalVersionInfo": None}}
        if operation == "Viewer" or "viewer" in query["query"][:200]:
            viewer = {"id": "u", "entity": "ent", "username": "u", "email": "u@x", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer}
        if operation == "UpsertBucket":
            return {"upsertBucket": self._upsert(variables, project)}
        if operation == "RunResumeStatus":
            bucket = self._bucket(variables["name"]) if variables["name"] in self.runs else None
            return {"model": {"id": "pid", "name": "p", "entity": entity, "bucket": bucket}}
        if operation == "Run":
            times = dict.fromkeys(("createdAt", "heartbeatAt"), "2026-01-01T00:00:00")
            more = {"projectId": "1", "state": "running", "systemMetrics": "{}", "historyKeys": None, "readOnly": False}
            user = {"name": "u", "username": "u"}
            found = {**self._bucket(variables["name"]), **times, **more, "user": user, "group": None}
            return {"project": {"run": found if variables["name"] in self.runs else None}}
        if operation == "CreateRunFiles":
            place = f"http://{host}/storage/{variables['run']}/"
            files = [{"name": name, "uploadUrl": place + name} for name in variables["files"]]
            return {"createRunFiles": {"runID": "B" + variables["run"], "uploadHeaders": [], "files": files}}
        if operation == "RunStoppedStatus":
            return {"project": {"run": {"stopped": False}}}
        return {}

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """One request of the file stream: rows at an offset, the newest summary, the exit code."""
        run = self.run(name)
        for file, part in (body.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                run.history[part["offset"] :] = part["content"]
            elif file == "wandb-summary.json" and part["content"]:
                run.summary = part["content"][-1]
        if body.get("complete") is not None:
            run.exit_code = body.get("exitcode")

    def _upsert(self, variables: dict[str, Any], project: dict[str, Any]) -> dict[str, Any]:
        run = self.run(variables["name"])
        inserted, run.started = not run.started, True
        run.config = variables.get("config") or run.config
        run.summary = variables.get("summaryMetrics") or run.summary
        return {"bucket": {**self._bucket(variables["name"]), "project": project}, "inserted": inserted}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.run(name)
        return {
            "id": "B" + name,
            "name": name,
            "displayName": name,
            "description": "",
            "config": run.config,
            "summaryMetrics": run.summary,
            "historyLineCount": len(run.history),
            "historyTail": json.dumps(run.history[-1:]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "notes": None,
            "groupName": None,
            "jobType": None,
            "commit": None,
            "sweepName": None,
            "wandbConfig": '{"t":1}',
        }


def _operation(query: str) -> str:
    match = re.search(r"(?:query|mutation)\s+(\w+)", query)
    return match[1] if match else ""


def _handler(stub: WandbStub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                return

        def log_message(self, *_: object) -> None:  # type: ignore[override]
            return

        def do_GET(self) -> None:
            self._answer({})

        def do_PUT(self) -> None:
            self._body()
            self._answer({})

        def do_POST(self) -> None:
            body = self._body()
            time.sleep(stub.hang_s)
            if stub.status != 200:
                self._answer({"errors": [{"message": "the stub says no"}]}, stub.status)
            elif stub.stream_status != 200 and self.path.endswith("/file_stream"):
                self._answer({"error": "the stub takes no rows"}, stub.stream_status)
            elif self.path == "/graphql":
                self._answer({"data": stub.graphql(json.loads(body), self.headers["Host"])})
            elif match := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                stub.stream(match[1], json.loads(body))
                self._answer({"limits": {}})
            else:
                self._answer({})

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _answer(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
