"""The fenced blocks of README.md and docs/**/*.md, each with the comment before it that declares how it is tested.

`<!-- test: fragment tokens -->` holds the kind of the block and, for most kinds, its name. Every code block has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NO_CODE = frozenset({"text", "console", "mermaid", "http", "diff"})
"""Languages of blocks for which a test is optional. Blocks of all others must be tested."""

_COMMENT = re.compile(r"<!-- test: (\w+)(?: (\w+))? -->")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    document: Path
    line: int
    """The number of its first line of text, from 1."""
    language: str
    text: str
    kind: str | None
    name: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks_of(document: Path) -> Iterator[Block]:
    lines = document.read_text("utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        comment = _COMMENT.fullmatch(lines[start - 1])
        kind, name = comment.groups() if comment else (None, None)
        text = "".join(f"{inner}\n" for inner in lines[start + 1 : number])
        yield Block(document, start + 2, lines[start][3:], text, kind, name or "")
        start = None
    assert start is None, f"{document.name} has an unclosed block"


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def blocks(kind: str) -> dict[str, Block]:
    """The blocks of one kind by name."""
    return {block.name: block for block in BLOCKS if block.kind == kind}
