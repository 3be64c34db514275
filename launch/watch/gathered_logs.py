"""Writes one log and one list of failures per node. In: the local folder of the ranks' logs. Out: HOSTNAME.log and failures.

One log per rank would put 100,000 files on the shared file system for 100,000 ranks. Instead, each node's agent copies the
lines of its ranks into HOSTNAME.log. A prefix tells the origin of each line: "[rank 3] …" or "[torchrun] …". At the end, the
agent writes the failures into HOSTNAME.failures.jsonl.

Torch-free.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from launch.watch.failures import AGENT_LOG, GATHERED, NODE_LOG, Failure

_BLOCK_BYTES = 1 << 20


class GatheredLogs:
    """Copies the logs of one node's ranks. `pump` copies whole lines only; `close` also copies a last line without a newline."""

    def __init__(self, own: Path, log_dir: Path, host: str) -> None:
        self._own = own
        self._log = log_dir / f"{host}{NODE_LOG}"
        self._failures = log_dir / f"{host}{GATHERED}"
        self._offsets: dict[str, int] = {}

    def pump(self) -> None:
        """Copy the whole lines that were written since the last call. Raises OSError if a file can't be read or written."""
        self._copy(final=False)

    def close(self, failures: Sequence[Failure]) -> None:
        """Copy the rest of all logs and write the failures. Raises OSError if a file can't be read or written."""
        self._copy(final=True)
        if failures:
            _append(self._failures, (json.dumps(asdict(failure)).encode() for failure in failures))

    def _copy(self, final: bool) -> None:
        for path in sorted(self._own.glob("*.log")):
            origin = "torchrun" if path.name == AGENT_LOG else path.stem.replace("_", " ")
            # Copying in blocks bounds the memory: a rank may have written gigabytes.
            while block := self._next_block(path, final):
                _append(self._log, (b"[%b] %b" % (origin.encode(), line) for line in block.split(b"\n")[: block.count(b"\n")]))

    def _next_block(self, path: Path, final: bool) -> bytes:
        """The whole lines after the last block, at most 1 MiB. Empty: nothing is left to copy.

        A part of a line is returned with a newline if the line is longer than 1 MiB, or if `final` is True.
        """
        offset = self._offsets.get(path.name, 0)
        with open(path, "rb") as file:
            file.seek(offset)
            block = file.read(_BLOCK_BYTES)
        whole = block[: block.rfind(b"\n") + 1]
        if not whole and block and (final or len(block) == _BLOCK_BYTES):
            whole = block
        self._offsets[path.name] = offset + len(whole)
        return whole if whole.endswith(b"\n") or not whole else whole + b"\n"


def _append(path: Path, lines: Iterable[bytes]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb") as file:
        for line in lines:
            file.write(line + b"\n")
