"""Which versions of libraries may compute a run, and what is said when they change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_config
from parallel.compat import supported
from parallel.compat.guard import TESTED, Guard
from parallel.compat.megatron_cpu import replacements
from parallel.compat.supported import changed_versions, version_problem
from parallel.compat.versions import is_between, numbers_of
from pretrain.preflight.verdict import preflight

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("version", "first", "last", "inside"),
    [
        ("0.16.1", "0.16.1", "0.18", True),
        ("0.18.1", "0.16.1", "0.18", True),
        ("0.19.0", "0.16.1", "0.18", False),
        ("0.19.2rc1", "0.19", None, True),
        ("0.16.0", "0.16.1", None, False),
        ("0.16.1+cu12", "0.16.1", "0.16.1", True),
        ("1.0", "0.17", None, True),
        ("unknown", "0.16.1", None, False),
    ],
)
def test_ranges_of_versions(version: str, first: str, last: str | None, inside: bool) -> None:
    assert is_between(version, first, last) == inside


@pytest.mark.parametrize(
    ("version", "refused"),
    [
        ("0.15.9", True),
        ("0.16.0", True),
        ("0.16.1", False),
        ("0.17.1", False),
        ("0.19.7", False),
        ("0.20.0", True),
        ("1.0", True),
    ],
)
def test_an_untested_version_is_refused_in_one_line(version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "installed_version", lambda library: version)
    problem = version_problem("megatron-core", {})
    assert (problem is not None) == refused
    if problem is not None:
        first, last = TESTED["megatron-core"]
        assert problem.got == version and f"{first} to {last}" in problem.rule and "PHALANX_UNTESTED=1" in problem.fix
        assert version_problem("megatron-core", {"PHALANX_UNTESTED": "1"}) is None
        found = [problem.path for problem in preflight(load_config("quickstart").config, with_data=False).problems]
        assert found == ["megatron-core"]


def source_of_megatron(folder: Path, info: str | None) -> Path:
    """A checkout of Megatron-LM that stands before the installed package."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("")
    if info is not None:
        (core / "package_info.py").write_text(info)
    return folder


@pytest.mark.parametrize(
    ("info", "version"), [("MAJOR = 0\nMINOR = 18\nPATCH = 3\n", "0.18.3"), ("nothing = 1\n", "0.0.0"), (None, "0")]
)
def test_the_source_that_is_imported_tells_the_version(
    info: str | None, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(source_of_megatron(tmp_path, info)))
    assert supported.installed_version("megatron-core") == version
    assert (version_problem("megatron-core", {}) is None) == (version == "0.18.3")


def test_ranks_and_tools_refuse_it_before_they_import_it(tmp_path: Path) -> None:
    """A megatron-core of tomorrow."""
    source_of_megatron(tmp_path, "MAJOR = 9\nMINOR = 9\nPATCH = 9\n")
    command = [sys.executable, "-m", "tools.cli", "rehearse", "quickstart"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "megatron-core = '9.9.9'" in done.stderr and "Traceback" not in done.stderr


def test_changed_versions_are_told() -> None:
    assert changed_versions({}) == []
    assert changed_versions({"megatron-core": supported.installed_version("megatron-core")}) == []
    assert changed_versions({"torch": "2.0"}) != []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supported, "installed_version", lambda library: "unknown")
        assert changed_versions({"torch": "2.0", "megatron-core": "0.15.0"}) == [], "a login node without the libraries"
    (notice,) = changed_versions({"megatron-core": "0.15.0", "torch": None, "numpy": "1.0"})
    assert "megatron-core 0.15.0 → " in notice.text and "numpy" not in notice.text


@pytest.mark.parametrize(("version", "count"), [("0.16.1", 2), ("0.17.1", 1), ("0.19.2", 1)])
def test_replacements_have_ranges(version: str, count: int) -> None:
    assert len(replacements("megatron.core.transformer.moe.moe_utils", version)) == count


def test_a_guard_has_a_range() -> None:
    guard = Guard("fault", "megatron-core", "guard", "symptom", "test", first="0.17", last="0.18")
    assert [guard.needed_by(version) for version in ("0.16.1", "0.17.0", "0.18.1", "0.19.0")] == [False, True, True, False]
    assert numbers_of("0.18.1") > numbers_of("0.18")
