"""TensorBoard and MLflow as copies of the record, read back with their own readers: each step once, whatever is killed."""

from __future__ import annotations

import math
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import schema
from configs.fields import walk
from pretrain.metrics.mlflow_store import TAG, MlflowStore
from pretrain.metrics.prometheus import PrometheusSink, as_text, make_prometheus_sink
from pretrain.metrics.store_copy import StoreJob, open_store
from pretrain.metrics.wandb_sink import CopySink, make_store_sink
from pretrain.run.folder import Outcome, RunFolder
from pretrain.run.record import Record
from tests.pretrain.metrics.test_sinks import row


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def record(folder: RunFolder, step: int = 0) -> Record:
    return Record.open(folder.metrics, step, lambda *_, **__: None, folder.path / "cut.jsonl")


def sink(kind: str, folder: RunFolder, **mlflow: Any) -> CopySink:
    config = schema.Config()
    config.metrics.sinks, config.run.name = [kind], "named"
    for key, value in mlflow.items():
        setattr(config.metrics.mlflow, key, value)
    made = make_store_sink(kind, config, folder, "line1", os.environ)
    assert isinstance(made, CopySink)
    return made


def tensorboard_scalars(folder: RunFolder, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder.tensorboard / "line1"), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    return [(event.step, event.value) for event in events.Reload().Scalars(tag)]


def mlflow_metrics(uri: str, key: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("phalanx")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags[TAG] == "line1" and run.info.run_name == "named"
    assert run.data.params["run.seed"] == "1234"
    assert run.info.status == "FINISHED"
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]


def reader_of(kind: str, folder: RunFolder, uri: str) -> Callable[[str], list[tuple[int, float]]]:
    return lambda key: tensorboard_scalars(folder, key) if kind == "tensorboard" else mlflow_metrics(uri, key)


# Each process that opens an MLflow store takes 5 s.
MLFLOW = [pytest.param(f"mlflow {store}", marks=pytest.mark.prove) for store in ("sqlite", "files")]


@pytest.mark.parametrize("kind", ["tensorboard", *MLFLOW])
def test_each_step_once_over_kills_and_attempts(kind: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is killed, an attempt that trains two steps again, and rows with values that are no numbers."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{folder.path}/files" if kind.endswith("files") else f"sqlite:///{folder.mlflow}/mlflow.db"
    kind = kind.split()[0]
    given = {"tracking_uri": uri} if "file:" in uri else {}
    opened, copy = record(folder), sink(kind, folder, **given)
    for step in (1, 2, 3):
        opened.append(row(step))
        copy.write(row(step))
    copy.close(Outcome(1, "finished", "", 3, 3))
    opened.append(row(4, loss=math.inf))
    opened.close()
    copy = sink(kind, folder, **given)
    copy._process.kill()
    copy._process.wait()
    opened = record(folder, 2)
    copy.write(row(3))
    for step in (3, 4, 5):
        opened.append(row(step, **({"val_loss/code": 1.5, "loss": math.inf} if step == 4 else {})))
    opened.close()
    copy.close(Outcome(2, "finished", "", 5, 5))
    read = reader_of(kind, folder, uri)
    losses = read("loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5]
    assert [value for step, value in losses if step != 4] == pytest.approx([row(step)["loss"] for step in (1, 2, 3, 5)])
    assert losses[3][1] > 1e300
    assert read("val_loss/code") == [(4, 1.5)]
    assert [step for step, _ in read("tokens")] == [1, 2, 3, 4, 5]


def test_tensorboard_follows_a_rollback(folder: RunFolder) -> None:
    """The steps that a rollback replaced are gone for TensorBoard's reader; a later attempt adds none of them again."""
    opened = record(folder)
    for attempt in range(2):
        store = open_store(StoreJob("tensorboard", str(folder.path), "line1", "named"))
        for step in (1, 2, 3, 4):
            store.write(row(step, samples=8 * step))
        for step in (3, 4, 5):
            store.write(row(step, samples=8 * step + 16, loss=2.0 + step))
        if attempt:
            for step in (1, 2, 3, 4, 5):
                store.write(row(step, **({"samples": 8 * step + 16, "loss": 2.0 + step} if step > 2 else {"samples": 8 * step})))
        store.flush()
        store.close(0)
    opened.close()
    assert tensorboard_scalars(folder, "loss") == [(1, row(1)["loss"]), (2, row(2)["loss"]), (3, 5.0), (4, 6.0), (5, 7.0)]


def test_a_half_written_row_of_mlflow_is_completed(folder: RunFolder) -> None:
    uri = f"sqlite:///{folder.path}/own.db"
    config = schema.Config()
    config.data.train = [schema.BlendPart("data/a,b (1)")]
    store = MlflowStore(uri, "phalanx", "named", "line1", {path: value for path, value, _ in walk(config)})
    store.write(row(1))
    store._client.log_metric(store.run_id, "tokens", row(2)["tokens"], step=2)
    again = MlflowStore(uri, "phalanx", "named", "line1", {})
    assert again._client.get_run(again.run_id).data.params["data.train.0.path"] == "data/a,b (1)"
    for step in (1, 2, 3):
        again.write(row(step))
    again.close(0)
    for key in ("tokens", "loss", "lr"):
        assert [step for step, _ in mlflow_metrics(uri, key)] == [1, 2, 3], key


def test_without_the_library_training_goes_on_with_one_warning(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "__init__.py").write_text("raise ImportError('No module named tensorboard')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    opened, copy = record(folder), sink("tensorboard", folder)
    copy._process.wait(30)
    opened.append(row(1))
    copy.write(row(1))
    copy.close(None)
    told = capfd.readouterr().err
    assert told.count("phalanx: TensorBoard:") == 1 and "pip install 'phalanx[tensorboard]'" in told


def test_prometheus_text_at_a_loopback_port() -> None:
    served = PrometheusSink('a "run"', 0)
    try:
        served.write({"step": 3, "loss": math.nan, "val_loss/code": 1.25, "val_loss": 2.0, "skipped": True, "why": "text"})
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = answer.read().decode()
        assert text.splitlines() == [
            "# TYPE phalanx_loss gauge",
            'phalanx_loss{run="a \\"run\\""} NaN',
            "# TYPE phalanx_skipped gauge",
            'phalanx_skipped{run="a \\"run\\""} 1.0',
            "# TYPE phalanx_step gauge",
            'phalanx_step{run="a \\"run\\""} 3.0',
            "# TYPE phalanx_val_loss gauge",
            'phalanx_val_loss{run="a \\"run\\""} 2.0',
            'phalanx_val_loss{run="a \\"run\\"",part="code"} 1.25',
        ]
        make_prometheus_sink("other", served.port).write({"loss": 1.0})
    finally:
        served.close(None)
    assert as_text("r", {"loss": 0.5}) == '# TYPE phalanx_loss gauge\nphalanx_loss{run="r"} 0.5\n'
