"""MkDocs asks here while it builds: the generated parts of each page come from tools/reference.py."""

from __future__ import annotations

from typing import Any

from tools.reference import fill


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page's text with its generated parts."""
    return fill(markdown)
