"""The code blocks of the documentation, and the commands in its sentences."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/GUIDELINES.md")),
    *sorted(ROOT.glob("docs/*.md")),
]

_FENCE = re.compile(r"( *)(```+|~~~+)(.*)")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


class Block(NamedTuple):
    """One fenced block."""

    page: str
    line: int  # of the fence; the code starts on the next one
    language: str
    code: str
    reason: str | None  # why it cannot be run: `<!-- not run: REASON -->` on the line before the fence

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def every_block() -> list[Block]:
    """Those of all pages."""
    return [block for page in PAGES for block in blocks(page.read_text(), str(page.relative_to(ROOT)))]


def blocks(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = text.splitlines()
    opened: tuple[int, re.Match[str]] | None = None
    for number, line in enumerate(lines, 1):
        fence = _FENCE.fullmatch(line)
        if opened is None and fence:
            opened = (number, fence)
        elif opened is not None and line.strip() == opened[1][2]:
            start, (indent, _, info) = opened[0], opened[1].groups()
            code = "\n".join(inside.removeprefix(indent) for inside in lines[start : number - 1])
            comment = _NOT_RUN.fullmatch(lines[start - 2].strip()) if start > 1 else None
            found.append(Block(page, start, info.strip(), code, comment[1] if comment else None))
            opened = None
    assert opened is None, f"{page}:{opened[0]}: this block is not closed"
    return found


def without_blocks(text: str) -> str:
    """The page with empty lines in the place of fenced blocks."""
    lines = text.splitlines()
    for block in blocks(text, "page"):
        for number in range(block.line - 1, block.line + block.code.count("\n") + 2):
            lines[number] = ""
    return "\n".join(lines)


def indented_code(text: str) -> list[int]:
    """The lines with code that is indented instead of fenced: it would not say what it is, nor be run."""
    in_list, found = False, []
    for number, (before, line) in enumerate(pairwise(["", *without_blocks(text).splitlines()]), 1):
        if re.match(r" {0,3}([*+-]|\d+\.) ", line):
            in_list = True
        elif line and not line.startswith(" "):
            in_list = False
        elif line.startswith("    ") and not before.strip() and not in_list:
            found.append(number)
    return found


def inline_code(text: str) -> list[str]:
    """Code inside of sentences and tables, in order."""
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", without_blocks(text))]


def headings(text: str) -> list[str]:
    """The titles of all sections."""
    return re.findall(r"^#+ (.+)$", without_blocks(text), flags=re.MULTILINE)
