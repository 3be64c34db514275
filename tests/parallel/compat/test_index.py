"""The index of patches: every guard, test and private name in it exists, and no patch lies elsewhere."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from parallel.compat import index, private_names
from parallel.compat.guard import TESTED, Guard
from parallel.compat.private_names import LibraryImports, changed_source, is_present, require_names
from tests.test_design import modules

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = {"torch", "megatron", "deepspeed", "wandb", "transformers", "numpy", "omegaconf", "safetensors", "tokenizers"}
NAME = "deepspeed.utils.groups:_EXPERT_PARALLEL_GROUP"


def by_guard(guard: Guard) -> str:
    return guard.guard


@pytest.mark.parametrize("guard", index.GUARDS, ids=by_guard)
def test_guard_and_test_exist(guard: Guard) -> None:
    tree = modules()[guard.module]
    assert has(tree, guard.guard.partition(":")[2].split(".")), f"no {guard.guard}"
    file, _, test = guard.test.partition("::")
    assert has(ast.parse((ROOT / file).read_text(encoding="utf-8")), [test]), f"no {guard.test}"
    assert guard.library in TESTED and guard.versions[0]


def has(tree: ast.AST, path: list[str]) -> bool:
    """Does a module or class define the functions and classes of `path`, each within the one before?"""
    for name in path:
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [node for node in ast.iter_child_nodes(tree) if isinstance(node, kinds) and node.name == name]
        if not found:
            return False
        tree = found[0]
    return True


@pytest.mark.usefixtures("deepspeed_imported")
def test_private_names_exist() -> None:
    for module in {guard.module for guard in index.GUARDS}:
        importlib.import_module(module)
    needed = [guard for guard in index.GUARDS if guard.needed_by(private_names.installed_version(guard.library))]
    assert [name for guard in needed for name in guard.names if not is_present(name)] == []


# These exist in all versions. Routers attach their losses by the first one in versions with and without the fault, which
# tests/parallel/compat/test_router_losses.py tells apart. Versions that no longer use the others keep them as deprecated.
EVERYWHERE = {
    "megatron.core.transformer.moe.router:TopKRouter.attach_and_log_load_balancing_loss",
    "megatron.core.transformer.moe.moe_utils:get_moe_layer_wise_logging_tracker",
    "megatron.core.transformer.moe.moe_utils:clear_aux_losses_tracker",
}
RANGED = [guard for guard in index.GUARDS if (guard.first or guard.last) and {*guard.names} - EVERYWHERE]


@pytest.mark.parametrize("guard", RANGED, ids=lambda guard: guard.fault)
def test_versions_outside_of_a_guards_range_have_nothing_to_guard(guard: Guard) -> None:
    """What a guard replaces or reads exists in the versions that need the guard, and in no other one."""
    importlib.import_module(guard.module)
    assert all(map(is_present, guard.names)) == guard.needed_by(private_names.installed_version(guard.library))


def test_modules_with_private_names_check_them_when_they_are_imported() -> None:
    for module in {guard.module for guard in index.GUARDS if guard.names}:
        calls = [ast.unparse(node) for node in modules()[module].body if isinstance(node, ast.Expr)]
        assert "require_names(__name__)" in calls, f"{module} does not check the private names that it needs"


@pytest.mark.parametrize(
    "name",
    [
        "deepspeed.utils.groups:_EXPERT_PARALLEL_GROUPS",
        "deepspeed.no_such_module:name",
        "deepspeed.runtime.engine:DeepSpeedEngine.no_such_method",
        "deepspeed.runtime.engine:DeepSpeedEngine#no_such_attribute",
        "deepspeed.runtime.no_such_engine:DeepSpeedEngine#module",
    ],
)
@pytest.mark.usefixtures("deepspeed_imported")
def test_a_missing_name_is_told_with_version_and_symptom(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard("A fault", "deepspeed", "our.module:guard", "weights are wrong", "tests/x.py::test_x", (NAME, name))
    monkeypatch.setattr(private_names, "guards_in", lambda module: [guard] if module == "our.module" else [])
    require_names("another.module")
    with pytest.raises(ConfigError) as caught:
        require_names("our.module")
    (problem,) = caught.value.problems
    assert problem.path == "deepspeed" and problem.got == private_names.installed_version("deepspeed")
    assert problem.rule == (
        f"deepspeed has no {name}; our.module:guard knows deepspeed 0.19.8 and needs it. Without this guard: weights are wrong"
    )
    assert problem.fix == "pip install 'deepspeed==0.19.8'"


def test_a_private_module_that_is_gone_is_told_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard("A fault", "torch", "our.module:guard", "weights are wrong", "tests/x.py::test_x", ("torch._gone:name",))
    monkeypatch.setattr(private_names, "guards_in", lambda module: [guard])
    gone = r"torch does not import: No module named 'torch\._gone'.*weights are wrong"
    with pytest.raises(ConfigError, match=gone), LibraryImports("our.module"):
        importlib.import_module("torch._gone")
    with pytest.raises(ConfigError, match=r"cannot import name '_gone'"), LibraryImports("our.module"):
        exec("from torch.utils import _gone")
    with pytest.raises(ModuleNotFoundError), LibraryImports("our.module"):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


def test_a_rank_ends_with_the_report_and_exit_code_2(tmp_path: Path) -> None:
    """The library is changed before the rank's own imports, as an upgrade would have changed it."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import parallel, runpy, sys\n"
        "import megatron.core.distributed.finalize_model_grads\n"
        "del sys.modules['megatron.core.distributed.finalize_model_grads']._update_router_expert_bias\n"
        "sys.argv = ['pretrain/main.py', '--config', 'quickstart']\n"
        "runpy.run_module('pretrain.main', run_name='__main__')\n"
    )
    logs = tmp_path / "logs"
    environ = {"PATH": "", "PYTHONPATH": str(ROOT), "PHALANX_LOG_DIR": str(logs)}
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    log = (logs / "rank_0.log").read_text()
    assert result.returncode == 2, log + result.stderr
    version = private_names.installed_version("megatron-core")
    assert f"megatron-core = '{version}'" in log and "Traceback" not in log
    assert "_update_router_expert_bias" in log and "the expert bias never moves" in log
    assert '"bad_input"' in (logs / "rank_0.failure.json").read_text()


def test_a_source_that_changed_is_told_alike() -> None:
    error = changed_source("megatron.core.jit", "enable_jit_fuser()")
    assert "megatron-core no longer holds 'enable_jit_fuser()' once in megatron.core.jit" in str(error)


def test_markdown_has_a_row_for_each_guard() -> None:
    text = index.markdown()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line and "| Fault " not in line]
    assert len(rows) == len(index.GUARDS)
    assert all(re.fullmatch(r"(\| [^|]+ ){5}\|", row.replace("\\|", "/")) for row in rows)
    assert "| `parallel.compat.deepspeed.guards:place_experts` |" in text and "| from 0.19.8 |" in text


# No patch outside parallel/compat.


def library_names(tree: ast.Module) -> set[str]:
    """Names of a module that stand for something imported from a library."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name.partition(".")[0] for a in node.names if a.name.partition(".")[0] in LIBRARIES}
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def root(node: ast.AST) -> str | None:
    """`a` of a.b[c].d."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def patches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of what changes a library's modules or classes, or reads their private names."""
    libraries = library_names(tree)
    for node in ast.walk(tree):
        if changes_or_reads(node, libraries) or imports_private(node):
            yield node.lineno, ast.unparse(node)  # type: ignore[attr-defined]


def changes_or_reads(node: ast.AST, libraries: set[str]) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("setattr", "delattr") and root(node.args[0]) in libraries
    if not isinstance(node, ast.Attribute | ast.Subscript) or root(node) not in libraries:
        return False
    return not isinstance(node.ctx, ast.Load) or (isinstance(node, ast.Attribute) and is_private(node.attr))


def imports_private(node: ast.AST) -> bool:
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return False
    source = getattr(node, "module", None)
    paths = [f"{source}.{alias.name}" if source else alias.name for alias in node.names]
    return any(path.partition(".")[0] in LIBRARIES and any(map(is_private, path.split("."))) for path in paths)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.nn.Linear = None",
        "import deepspeed.ops\ndeepspeed.ops.x['y'] = {}",
        "from torch import nn\nsetattr(nn.Module, 'forward', None)",
        "from torch import nn\ndel nn.Module.forward",
        "import torch\ntorch.cuda.memory._record_memory_history()",
        "from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias",
        "import torch._dynamo",
    ],
)
def test_a_patch_is_recognised(source: str) -> None:
    assert list(patches(ast.parse(source)))


def test_no_patch_lies_outside_of_compat() -> None:
    found = [
        f"{module}:{line} {text}"
        for module, tree in modules().items()
        if not module.startswith("parallel.compat.")
        for line, text in patches(tree)
    ]
    assert not found


def test_product_code_uses_no_mocks() -> None:
    mocking = [
        module
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and "unittest" in ast.unparse(node)
    ]
    assert not mocking


def test_replaced_puts_back_what_was_there() -> None:
    class Owner:
        value: Any = 1

    with pytest.raises(ZeroDivisionError), private_names.replaced(Owner, "value", 2):
        assert Owner.value == 2
        raise ZeroDivisionError
    assert Owner.value == 1
