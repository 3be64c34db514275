"""docs/troubleshooting.md against the program: each heading is a text that the code can print, each key and path exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from configs.keys import all_keys
from configs.schema import Config

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
FOLDERS = ("configs", "parallel", "pretrain", "launch", "tools")
HEADING = re.compile(r"^### (.+)$", re.MULTILINE)
SECTIONS = "|".join(Config.__dataclass_fields__)
PLACEHOLDER = "…"


def _constant_text(node: ast.AST) -> str | None:
    """A string constant, or an f-string with a placeholder for each value. None for any other node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values)
    return None


def _strings(node: ast.AST) -> Iterator[str]:
    """The texts in a tree, docstrings left out: a docstring is not printed."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        text = _constant_text(child)
        if text is not None:
            yield text
        else:
            yield from _strings(child)


@cache
def program_texts() -> tuple[str, ...]:
    """Every string of the product code."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return tuple(text for file in files for text in _strings(ast.parse(file.read_text(encoding="utf-8"))))


def is_printed(heading: str) -> bool:
    """Whether one string of the program holds the heading. A placeholder may stand for any run of characters."""
    pattern = re.compile(".*?".join(re.escape(part) for part in heading.split(PLACEHOLDER)), re.DOTALL)
    return any(pattern.search(text) for text in program_texts())


def test_each_heading_is_a_text_of_the_program() -> None:
    headings = HEADING.findall(PAGE)
    assert len(headings) > 20
    assert [line for line in headings if not (line.startswith("`") and line.endswith("`"))] == []
    assert [line for line in headings if not is_printed(line.strip("`"))] == []


def test_a_text_that_the_program_lacks_is_found_out() -> None:
    assert not is_printed("must divide the world of … x … = … trolls")


def test_each_heading_has_an_answer() -> None:
    answers = re.split(r"^##+ .+$", PAGE, flags=re.MULTILINE)
    headings = re.findall(r"^(##+) .+$", PAGE, re.MULTILINE)
    assert [
        i for i, (level, text) in enumerate(zip(headings, answers[1:], strict=True)) if level == "###" and len(text) < 60
    ] == []


def test_each_key_is_in_the_schema() -> None:
    named = set(re.findall(rf"\b((?:{SECTIONS})(?:\.[a-z_]+)+)(?=[=` \]])", PAGE))
    named -= {"metrics.jsonl"}
    assert len(named) > 20
    assert named - set(all_keys()) == set()


def test_each_path_exists() -> None:
    paths = re.findall(rf"\b((?:{'|'.join(FOLDERS)}|tests|docs)/[\w/]+\.\w+)", PAGE)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
