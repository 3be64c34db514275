"""One log and one list of failures a node. In: the folder on this machine that its ranks write. Out: two growing files.

100,000 ranks with a log each would be 100,000 files on the shared file system. Here each node's agent copies what its
ranks wrote into HOSTNAME.log, every line with its origin ("[rank 3] …", "[torchrun] …"), and at the end the failures
into HOSTNAME.failures.jsonl.

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
    """Copies whole lines; `close` also what has no newline."""

    def __init__(self, own: Path, log_dir: Path, host: str) -> None:
        self._own = own
        self._log = log_dir / f"{host}{NODE_LOG}"
        self._failures = log_dir / f"{host}{GATHERED}"
        self._offsets: dict[str, int] = {}

    def pump(self) -> None:
        """Copy what is new. Raises OSError."""
        self._copy(final=False)

    def close(self, failures: Sequence[Failure]) -> None:
        """Copy the rest, and leave the failures. Raises OSError."""
        self._copy(final=True)
        if failures:
            _append(self._failures, (json.dumps(asdict(failure)).encode() for failure in failures))

    def _copy(self, final: bool) -> None:
        for path in sorted(self._own.glob("*.log")):
            origin = "torchrun" if path.name == AGENT_LOG else path.stem.replace("_", " ")
            # Block after block: a rank that wrote gigabytes must not be held in memory.
            while block := self._next_block(path, final):
                _append(self._log, (b"[%b] %b" % (origin.encode(), line) for line in block.split(b"\n")[: block.count(b"\n")]))

    def _next_block(self, path: Path, final: bool) -> bytes:
        """Whole lines from where the last block ended; empty: nothing more."""
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
