"""An MLflow run of a training run. In: rows of the record. Out: metrics, one value a step; the config as parameters.

MLflow can't delete values. A step that a rollback replaced therefore stays in its first version, as in W&B. All attempts of a
run share one MLflow run, which is found by the tag `phalanx.line`.

Torch-free.
"""

from __future__ import annotations

import os
import time
from typing import Any

from pretrain.metrics.tensorboard_store import is_number

TAG = "phalanx.line"
# MLflow's bounds on one request and one parameter.
_PARAMS_AT_ONCE, _PARAM_CHARS = 100, 500


class MlflowStore:
    """An MLflow run, continued or new. Raises ImportError without MLflow, and MlflowException when the store refuses."""

    def __init__(self, uri: str, experiment: str, name: str, line: str, config: dict[str, Any]) -> None:
        # The library reports its use to its makers unless it is told not to.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Its notes on a new database would come between the lines of the console.
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient  # noqa: PLC0415  an optional package
        from mlflow.entities import Metric, Param  # noqa: PLC0415

        self._metric, self._client = Metric, MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else self._client.create_experiment(experiment)
        runs = self._client.search_runs([place], f"tags.`{TAG}` = '{line}'")
        if runs:
            self.run_id = runs[0].info.run_id
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self._client.create_run(place, tags={TAG: line}, run_name=name).info.run_id
            # MLflow's names have no brackets: data.train[0].path becomes data.train.0.path.
            names = (key.replace("[", ".").replace("]", "") for key in config)
            params = [Param(name, str(value)[:_PARAM_CHARS]) for name, value in zip(names, config.values(), strict=True)]
            for first in range(0, len(params), _PARAMS_AT_ONCE):
                self._client.log_batch(self.run_id, params=params[first : first + _PARAMS_AT_ONCE])
        # `loss` is the last metric of a row, so a step that has it is whole.
        self._steps = self._steps_of("loss")
        # A store of files may have a part of the row that a killed writer was at.
        self._may_be_partial = True

    def _steps_of(self, key: str) -> set[int]:
        return {metric.step for metric in self._client.get_metric_history(self.run_id, key)}

    def write(self, row: dict[str, Any]) -> None:
        step = row["step"]
        if step in self._steps:
            return
        keys = [*(key for key in row if key not in ("step", "loss") and is_number(row[key])), "loss"]
        if self._may_be_partial:
            keys = [key for key in keys if step not in self._steps_of(key)]
            self._may_be_partial = False
        now_ms = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[self._metric(key, float(row[key]), now_ms, step) for key in keys])
        self._steps.add(step)

    def flush(self) -> None:
        return

    def close(self, exit_code: int) -> None:
        self._client.set_terminated(self.run_id, "FAILED" if exit_code else "FINISHED")
