"""Whether the files of a run folder can be read without harm. In: a run folder. Out: problems.

Opening a pipe that nobody writes to takes for ever, and a file of gigabytes in the place of a small one takes the memory of a
login node. Both are found by their metadata.

Torch-free.
"""

from __future__ import annotations

import os
import stat

from configs.errors import ConfigError, Problem
from pretrain.run.files import storage_problem
from pretrain.run.folder import RunFolder

# In bytes. The files of the first kind have some kilobytes and are read whole; those of the second have some megabytes and are
# read line by line, several times.
_SMALL, _LARGE = 1 << 24, 1 << 28
# In bytes. With less free space than this, a row or a log may find no room.
_FULL = 1 << 20
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def disk_trouble(folder: RunFolder) -> list[str]:
    """What is wrong with the file system of a live run, whose rows and events wait in memory then. Raises OSError."""
    found = os.statvfs(folder.path)
    if found.f_flag & os.ST_RDONLY:
        return ["the file system is read-only: nothing can be recorded or saved"]
    if found.f_bavail * found.f_frsize < _FULL:
        return ["the file system is full: rows, events and saves wait for room"]
    return []


def check_files(folder: RunFolder) -> list[Problem]:
    """Problems of the files that are read of a run. Raises ConfigError where the folder may not be looked into."""
    try:
        return _problems(folder)
    except OSError as error:
        raise ConfigError(storage_problem("RUN_DIR", folder.path, error)) from error


def _problems(folder: RunFolder) -> list[Problem]:
    problems = []
    small = (folder.config, folder.provenance, folder.outcome, folder.done, folder.lock, folder.wandb_id)
    large = (folder.events, folder.experts, folder.evaluations)
    most_bytes = dict.fromkeys(small, _SMALL) | dict.fromkeys(large, _LARGE)
    for path in (*most_bytes, folder.metrics):
        if not path.exists():
            continue
        found, most, rule = path.stat(), most_bytes.get(path), ""
        if not stat.S_ISREG(found.st_mode):
            rule = f"{path.name} must be a file, it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'a device')}"
        elif most is not None and found.st_size > most:
            rule = f"{path.name} must have at most {most >> 20} MiB, it has {found.st_size >> 20} MiB"
        if rule:
            problems.append(Problem("RUN_DIR", str(path), rule, "look what wrote it and move it away, or name another run"))
    return problems
