"""The picture of the experts and the run's page in W&B: asked for, read back from W&B's own files, harmless when they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from wandb.proto import wandb_internal_pb2

from configs.schema import Config
from parallel.compat import wandb_files
from pretrain.metrics.expert_picture import expert_picture
from pretrain.metrics.wandb_sink import make_wandb_sink
from pretrain.run.files import as_line
from pretrain.run.folder import Outcome
from tests.pretrain.metrics.test_wandb import ID, KEY, environment, write_rows
from tests.tools.report.world import make_run
from tests.wandb_read import offline_steps
from tests.wandb_stub import WandbStub


def test_the_picture_is_bright_where_an_expert_has_most(tmp_path: Path) -> None:
    counts = [[[4, 4, 4, 4], [16, 0, 0, 0]], [[4, 4, 4, 4], [4, 4, 4, 4]]]
    rows = [
        {"step": step, "tokens": 16, "layers": [0, 1], "counts": of_step} for step, of_step in zip((10, 20), counts, strict=True)
    ]
    (tmp_path / "experts.jsonl").write_bytes(b"".join(map(as_line, rows)))
    image = expert_picture(tmp_path / "experts.jsonl")
    assert image is not None
    quarters = [image.getpixel((x, y)) for y in (100, 400) for x in (200, 800)]
    assert quarters == [(68, 1, 84), (68, 1, 84), (253, 231, 37), (68, 1, 84)]
    assert expert_picture(tmp_path / "none.jsonl") is None


# Annotations know nothing of what protobuf makes.
RECORD = vars(wandb_internal_pb2)["Record"]


def records(run_dir: Path) -> list[Any]:
    (path,) = (run_dir / "wandb").glob(f"offline-run-*/run-{ID}.wandb")
    payloads = wandb_files._records(path.read_bytes()[wandb_files._HEADER_BYTES :], wandb_files._HEADER_BYTES)
    return [RECORD.FromString(payload) for _, payload in payloads]


def asking(finish_timeout_s: float = 40.0) -> Config:
    config = Config()
    config.metrics.wandb.expert_picture = config.metrics.wandb.report = True
    config.metrics.wandb.finish_timeout_s = finish_timeout_s
    return config


def test_w_and_b_has_the_picture_and_the_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", steps=0)
    folder.wandb.mkdir()
    sink = make_wandb_sink(asking(), folder, ID, environment(tmp_path))
    write_rows(folder, sink, 1, 3)
    sink.close(Outcome(2, "finished", "", 3, 3))
    assert offline_steps(folder.path, ID) == [1, 2, 3]
    found = records(folder.path)
    (page,) = (record.artifact for record in found if record.HasField("artifact"))
    assert page.name == f"report-{ID}" and page.type == "report"
    summary = {update.key: json.loads(update.value_json) for record in found for update in record.summary.update}
    assert summary["expert_load"]["_type"] == "image-file"
    (picture,) = folder.wandb.glob(f"offline-run-*/files/{summary['expert_load']['path']}")
    assert np.array(Image.open(picture)).std() > 10
    assert "phalanx" not in capfd.readouterr().err


@pytest.mark.prove
def test_a_server_that_takes_no_artifacts_loses_no_row(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=0)
    folder.wandb.mkdir()
    with WandbStub() as stub:
        sink = make_wandb_sink(asking(20.0), folder, ID, environment(tmp_path, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY))
        write_rows(folder, sink, 1, 3)
        sink.close(Outcome(2, "finished", "", 3, 3))
        assert sorted(stub.runs[ID].steps()) == [1, 2, 3]
