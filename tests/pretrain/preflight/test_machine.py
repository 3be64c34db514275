"""What is known of the ranks' machine before they start: a config that a CPU can't train is refused by `check`."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from pretrain.preflight import world
from pretrain.preflight.verdict import preflight
from pretrain.preflight.world import computes_on_cpu

ODD = ["model.moe.grouped_gemm=on", "model.moe.ffn_hidden_size=50"]


@pytest.mark.parametrize(
    ("words", "environ", "has_driver", "want"),
    [
        (["cluster.device=cpu"], {}, True, True),
        (["cluster.device=cpu", "launch.target=slurm"], {}, True, True),
        (["cluster.device=cuda"], {}, False, False),
        (["cluster.device=auto"], {}, False, True),
        (["cluster.device=auto"], {}, True, False),
        (["cluster.device=auto"], {"CUDA_VISIBLE_DEVICES": ""}, True, True),
        (["cluster.device=auto"], {"CUDA_VISIBLE_DEVICES": "-1"}, True, True),
        (["cluster.device=auto"], {"CUDA_VISIBLE_DEVICES": "0"}, True, False),
        (["cluster.device=auto", "launch.target=slurm"], {}, False, False),
        (["cluster.device=auto", "cluster.gpu=h100"], {}, False, False),
    ],
)
def test_when_ranks_surely_compute_on_cpus(
    words: list[str], environ: dict[str, str], has_driver: bool, want: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "_DRIVER", tmp_path if has_driver else tmp_path / "absent")
    assert computes_on_cpu(load_config("quickstart", words).config, environ) is want


def test_grouped_products_of_odd_widths_are_refused_for_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The working folder may have a run of this name.
    monkeypatch.chdir(tmp_path)
    config = load_config("quickstart", [*ODD, "cluster.device=cpu"]).config
    (problem,) = preflight(config, with_data=False).problems
    assert problem.path == "model.moe.grouped_gemm" and "inner width 50 is no multiple of 4" in problem.rule
    on_slurm = ["launch.target=slurm", "launch.slurm.time=1-00:00:00", "cluster.device=auto"]
    assert preflight(load_config("quickstart", [*ODD, *on_slurm]).config, with_data=False).problems == []
