"""What the site shows of files outside docs/, so that no text is written twice. A hook of mkdocs.yml.

On a line of its own in a page:

    <!-- include README.md#install -->      a section, without its heading; what hangs below it hangs below the page's
    <!-- include README.md#top -->          what comes before the first section, without the title
    <!-- include CONTRIBUTING.md -->        all of it, title included
    <!-- include examples/tutorial.py -->   a program, folded
    <!-- compare OLD.py NEW.py -->          a program, and what makes another one of it
    <!-- reference package.module.Name -->  its entry in the reference

What is missing is an error. Links are written as they work in the file they stand in. A link to a page of the site is
kept, one to another file of the checkout becomes its text.
"""

from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

# Which page a file outside docs/ is shown on.
SHOWN_ON = {
    "README.md": "docs/index.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "CHANGELOG.md": "docs/changelog.md",
    "benchmarks/GUIDELINES.md": "docs/measuring.md",
}

_INCLUDE = re.compile(r"<!-- include ([^\s#,]+)(?:#([\w-]+))? -->")
_COMPARE = re.compile(r"<!-- compare ([^\s,]+) ([^\s,]+) -->")
_REFERENCE = re.compile(r"<!-- reference ([\w.]+) -->")
_HEADING = re.compile(r"(#+) (.+)")
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """The page with everything that it includes."""
    return expand(markdown, f"docs/{page.file.src_uri}")


def expand(markdown: str, path: str) -> str:
    """``markdown``, the text of the page at ``path`` in the checkout, with what it includes and with its links."""
    lines, level = [], 1
    for line, is_code in _lines(_relink(markdown, path, path)):
        if not is_code and (heading := _HEADING.fullmatch(line)):
            level = len(heading[1])
        elif not is_code and (include := _INCLUDE.fullmatch(line)):
            line = _included(include[1], include[2], path, level)
        elif not is_code and (compare := _COMPARE.fullmatch(line)):
            line = _compared(compare[1], compare[2], path)
        elif not is_code and (reference := _REFERENCE.fullmatch(line)):
            line = _reference(reference[1], path)
        lines.append(line)
    return "\n".join(lines)


def section(markdown: str, slug: str) -> tuple[int, str]:
    """The level of the heading with this slug, and the text below it. "top": 1, and the text before any section."""
    level, body = 0, []
    for line, is_code in _lines(markdown):
        heading = None if is_code else _HEADING.fullmatch(line)
        if level and heading and (slug == "top" or len(heading[1]) <= level):
            break
        if level:
            body.append(line)
        elif heading and slug in ("top", slugify(heading[2])):  # the first heading is the title
            level = len(heading[1])
    if not level:
        raise PluginError(f"no heading #{slug}")
    return level, "\n".join(body).strip()


def slugify(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _included(source: str, slug: str | None, path: str, level: int) -> str:
    file = ROOT / source
    if not file.is_file():
        raise PluginError(f"{path} includes {source}, which does not exist")
    text = file.read_text()
    if file.suffix == ".py":
        return _folded(source, text)
    if slug is None:
        return _relink(text, source, path)
    try:
        depth, text = section(text, slug)
    except PluginError as error:
        raise PluginError(f"{path} includes {source}: {error}") from None
    return _map(_relink(text, source, path), lambda line: _moved(line, level - depth))


def _compared(old: str, new: str, path: str) -> str:
    for source in (old, new):
        if not (ROOT / source).is_file():
            raise PluginError(f"{path} compares {source}, which does not exist")
    texts = [(ROOT / source).read_text() for source in (old, new)]
    lines = [text.splitlines() for text in texts]
    changes = "\n".join(difflib.unified_diff(*lines, old, new, lineterm=""))
    return f"```diff\n{changes}\n```\n\n{_folded(old, texts[0])}\n{_folded(new, texts[1])}"


def _reference(name: str, path: str) -> str:
    module, _, attribute = name.rpartition(".")
    files = [ROOT / f"{module.replace('.', '/')}{end}" for end in (".py", "/__init__.py")]
    if not any(file.is_file() and re.search(rf"\b{attribute}\b", file.read_text()) for file in files):
        raise PluginError(f"{path} shows the reference of {name}, which does not exist")
    return f"::: {name}"


def _folded(source: str, code: str) -> str:
    body = "\n".join(f"    {line}".rstrip() for line in ["```python", *code.rstrip().splitlines(), "```"])
    return f'??? example "All of {source}"\n\n{body}\n'


def _moved(line: str, by: int) -> str:
    heading = _HEADING.fullmatch(line)
    return f"{'#' * (len(heading[1]) + by)} {heading[2]}" if heading else line


def _relink(markdown: str, source: str, path: str) -> str:
    """The text of ``source`` with its links as they must be on the page at ``path``."""

    def target(match: re.Match[str]) -> str:
        text, link = match.groups()
        file, hash_, anchor = link.partition("#")
        if not file or re.match(r"\w+:", file):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), file))
        if not (ROOT / file).exists():
            raise PluginError(f"{source} links to {link}, which does not exist")
        shown = SHOWN_ON.get(file, file)
        if not shown.startswith("docs/"):
            return text
        return f"[{text}]({posixpath.relpath(shown, posixpath.dirname(path))}{hash_}{anchor})"

    return _map(markdown, lambda line: _LINK.sub(target, line))


def _map(markdown: str, change: Callable[[str], str]) -> str:
    return "\n".join(line if is_code else change(line) for line, is_code in _lines(markdown))


def _lines(markdown: str) -> list[tuple[str, bool]]:
    """The lines, each with whether it belongs to fenced code."""
    lines, fence = [], ""
    for line in markdown.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if fence:
            lines.append((line, True))
            fence = "" if line.strip() == fence else fence
        else:
            lines.append((line, bool(mark)))
            fence = mark[1] if mark else ""
    return lines
