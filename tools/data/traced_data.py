"""The sample streams of a run's attempts. In: a run's history. Out: `SampleStream`s over the token files that its configs name.

Torch-free.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from configs.errors import ConfigError, Problem
from configs.schema import Config
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.tensor_file import DamagedFile
from pretrain.data.history import RunHistory
from pretrain.data.indexed import index_sha256
from pretrain.data.samples import SampleStream
from pretrain.data.streams import NO_MASKS, open_train
from pretrain.run.folder import complete_checkpoints

# Keys on which the training samples don't depend.
_NOT_READ = ("tokenizer", "cache_dir", "valid_sets", "max_epochs")


class TracedData:
    """The streams of a run's attempts, each opened once. Attempts that read the same samples share one."""

    def __init__(self, history: RunHistory) -> None:
        self.history = history
        self._streams: dict[str, SampleStream] = {}

    def key_of(self, attempt: int) -> str:
        """Equal for attempts whose sample numbers mean the same samples."""
        config = self.history.config_of(attempt)
        data = {name: value for name, value in asdict(config.data).items() if name not in _NOT_READ}
        return json.dumps([data, config.batch.seq_length_tokens, config.run.seed], sort_keys=True)

    def stream(self, attempt: int) -> SampleStream:
        """Raises ConfigError for token files that are missing, damaged or not those of the run."""
        key = self.key_of(attempt)
        if key not in self._streams:
            config = self.history.config_of(attempt)
            if problems := self._changed_files(attempt, config):
                raise ConfigError(problems)
            self._streams[key] = open_train(config, NO_MASKS)
        return self._streams[key]

    def _changed_files(self, attempt: int, config: Config) -> list[Problem]:
        """Parts whose index is another than the newest checkpoint that was trained on this data says."""
        for step, folder in complete_checkpoints(self.history.folder.checkpoints):
            try:
                data = read_manifest(folder).data
            except DamagedFile:
                continue
            if data is None or self.key_of(self.history.attempt_of(step)) != self.key_of(attempt):
                continue
            parts = [*config.data.train, *(part for phase in config.data.phases for part in phase.train)]
            later = [part for phase in data.get("phases", ()) for part in phase["train"]]
            return [
                Problem(
                    f"data.train[{number}].path" if number < len(config.data.train) else "data.phases",
                    part.path,
                    f"the .idx must be that of step {step}, sha256 {known['idx_sha256'][:12]}…; it is another",
                    "put the run's own token files there",
                )
                for number, (part, known) in enumerate(zip(parts, data["train"] + later))
                if Path(f"{part.path}.idx").exists() and index_sha256(part.path) != known["idx_sha256"]
            ]
        return []
