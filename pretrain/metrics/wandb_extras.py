"""What W&B gets beside the rows, where it is asked for: a picture of the experts' load, and the run's page.

In: W&B's run and a run folder. One that can't be made is a warning; the rows are sent all the same.

Torch-free.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs import own_packages
from pretrain.metrics.copy_process import one_line, warn
from pretrain.metrics.expert_picture import expert_picture
from pretrain.run.folder import RunFolder


def add_expert_picture(wandb: Any, run: Any, folder: RunFolder) -> None:
    """Put the picture into W&B's summary: a row of the history would be one more than the record has."""
    try:
        if image := expert_picture(folder.experts):
            run.summary.update({"expert_load": wandb.Image(image)})
    except Exception as error:
        warn(f"no picture of the experts ({type(error).__name__}: {one_line(error)})")


def add_report(wandb: Any, run: Any, folder: RunFolder, timeout_s: float) -> None:
    """Log the page as a version of the artifact report-ID. `timeout_s`: how long making it may take."""
    try:
        with tempfile.TemporaryDirectory(prefix="phalanx_report_") as made:
            artifact = wandb.Artifact(f"report-{run.id}", type="report")
            # W&B copies the file into a folder of its own, so that the temporary one may go.
            artifact.add_file(str(_make_page(folder, Path(made) / "report.html", timeout_s)))
            run.log_artifact(artifact)
    except Exception as error:
        warn(f"no report ({type(error).__name__}: {one_line(error)}); phalanx report {folder.path} makes it")


def _make_page(folder: RunFolder, page: Path, timeout_s: float) -> Path:
    """The page, made by the command, which belongs to a floor above. Raises RuntimeError with the command's words."""
    command = [*own_packages.command(sys.executable, "tools.cli"), "report", str(folder.path), "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"exit code {done.returncode}")
    return page
