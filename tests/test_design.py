"""The architecture, asserted: what imports what, what stays light, and that every key of the config is used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from configs.keys import all_keys

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "parallel", "pretrain", "launch", "tools")
# A folder may import itself and what stands here.
BELOW = {
    "configs": (),
    "parallel": ("configs",),
    "pretrain": ("configs", "parallel"),
    "launch": ("configs", "parallel", "pretrain"),
    "tools": ("configs", "parallel", "pretrain", "launch"),
}
HEAVY = ("torch", "megatron", "deepspeed", "wandb", "transformers")

# The last line of a module's docstring, where importing the module imports nothing of HEAVY: a login node answers at once.
MARK = "Torch-free."
# They run on compute nodes only.
HEAVY_BY_DESIGN = ("launch.torchrun", "launch.agent", "launch.doctor.network_probe")

# They parse words and then import only what the subcommand needs.
DISPATCH = ("tools.rehearse.cli", "tools.data.cli", "tools.convert.cli", "tools.inference.cli", "pretrain.build")

# Words for people, values that a rule holds at the one that megatron-core has (they matter when converting), and a limit
# that `check` warns about.
NO_READER = {
    "data.max_epochs",
    "model.source", "cluster.name", "model.position.scaling.low_freq_factor", "model.position.scaling.high_freq_factor",
}  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, ast.Module]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        return [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def ours(name: str) -> bool:
    return name.split(".")[0] in FOLDERS


def top_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that run at import: everything outside functions and `if TYPE_CHECKING`."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        queue += [child for child in ast.iter_child_nodes(node) if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))]


@cache
def graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports when it is imported."""
    found = {}
    for module, tree in modules().items():
        names = {name for node in top_level(tree) for name in imported(node) if ours(name)}
        found[module] = {name for name in names if name in modules()} - {module}
    return found


def is_marked(module: str) -> bool:
    return (ast.get_docstring(modules()[module]) or "").endswith(MARK)


def is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/") / "__init__.py").exists()


@cache
def heavy_modules() -> frozenset[str]:
    """Modules that import something heavy when they are imported, themselves or through one of ours."""
    found = {
        module
        for module, tree in modules().items()
        if any(name.split(".")[0] in HEAVY for node in top_level(tree) for name in imported(node))
    }
    while more := {module for module, names in graph().items() if names & found} - found:
        found |= more
    return frozenset(found)


def test_light_modules_import_nothing_heavy() -> None:
    marked = [module for module in modules() if is_marked(module)]
    script = f"""
import importlib, sys
for name in {marked!r}:
    importlib.import_module(name)
    heavy = sorted(set(sys.modules) & set({HEAVY!r}))
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_light_module_is_marked() -> None:
    light = {module for module in modules() if not is_package(module)} - heavy_modules()
    assert light == {module for module in modules() if is_marked(module)}


def test_what_a_login_node_needs_is_light() -> None:
    needed = ("configs", "parallel.legality", "parallel.memory", "pretrain.preflight", "pretrain.run", "launch", "tools.planner")
    assert not [module for module in heavy_modules() if module.startswith(needed) and module not in HEAVY_BY_DESIGN]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_down(folder: str) -> None:
    allowed = {folder, *BELOW[folder]}
    wrong = [
        f"{module} imports {name}"
        for module, tree in modules().items()
        if module.split(".")[0] == folder
        for node in ast.walk(tree)
        for name in imported(node)
        if ours(name) and name.split(".")[0] not in allowed
    ]
    assert not wrong


def test_no_import_cycles() -> None:
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != "open", " -> ".join((*path[path.index(module) :], module))
        if state.get(module) == "done":
            return
        state[module] = "open"
        for name in sorted(graph()[module]):
            visit(name, (*path, module))
        state[module] = "done"

    for module in graph():
        visit(module, ())


def test_no_imports_of_ours_inside_functions() -> None:
    hidden = [
        f"{module}:{node.lineno} imports {name}"
        for module, tree in modules().items()
        if module not in DISPATCH
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        for name in imported(node)
        if ours(name) and isinstance(node, ast.stmt)
    ]
    assert not hidden


CHECKS = ("configs", "parallel.legality", "pretrain.preflight", "tools.check")


@cache
def names_in_modules() -> list[tuple[set[str], set[str]]]:
    """For each module that does something with a config: the attributes it reads, and every name in it.

    Modules that only check are left out: a key that nothing but a rule reads is not used.
    """
    found = []
    for module, tree in modules().items():
        if module.startswith(CHECKS):
            continue
        nodes = list(ast.walk(tree))
        attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
        names = {node.id for node in nodes if isinstance(node, ast.Name)} | {
            node.arg for node in nodes if isinstance(node, ast.arg)
        }
        found.append((attributes, attributes | names))
    return found


def is_used(path: str) -> bool:
    """Some module reads an attribute of the key's name, and names its section (or the section's class) too."""
    section, _, leaf = path.rpartition(".")
    owners = {section.rsplit(".", 1)[-1], all_keys()[section].type.__name__}
    return any(leaf in attributes and owners & names for attributes, names in names_in_modules())


def test_every_key_is_used() -> None:
    unused = {key.path for key in all_keys().values() if key.kind != "section" and not is_used(key.path)} - NO_READER
    assert unused == set(), "accepted but never used: read them, or take them out of the schema"


def test_every_key_is_documented_with_its_rule() -> None:
    for module in (name for name in modules() if re.fullmatch(r"configs\.(\w+_)?schema", name)):
        for node in ast.walk(modules()[module]):
            if isinstance(node, ast.AnnAssign):
                assert isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "key", ast.unparse(node)
                sections = {key.type.__name__ for key in all_keys().values() if key.kind == "section"}
                words = ast.unparse(node.value)
                assert any(f"factory={name})" in words for name in sections) or re.search(r"'[^']{3,}'|\"[^\"]{3,}\"", words), (
                    words
                )
