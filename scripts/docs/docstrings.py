"""Docstrings as Markdown: roles become links, literal blocks fenced code. An extension of griffe, see mkdocs.yml."""

from __future__ import annotations

import ast
import re
import textwrap

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|attr):`([\w.]+)`")
_LITERAL = re.compile(r"^(?P<before>.*?)::\n\n(?P<block>(?:(?: {4}.*)?\n)*(?: {4}.*)(?:\n|$))", re.MULTILINE)
_DOCTEST = re.compile(r"^(>>> .*(?:\n.+)*)", re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrites what is reStructuredText in the docstrings, which mkdocstrings reads as Markdown."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Called when all of the package has been read."""
        _rewrite(pkg)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring:
        obj.docstring.value = markdown(obj.docstring.value, obj)
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(member)


def markdown(docstring: str, obj: griffe.Object) -> str:
    """The docstring of ``obj`` without roles, literal blocks and doctests."""
    linked = _ROLE.sub(lambda role: _linked(role[1], obj), docstring)
    return _DOCTEST.sub(r"```pycon\n\1\n```", _LITERAL.sub(_fenced, linked))


def _linked(name: str, obj: griffe.Object) -> str:
    """A method is named inside of its own class, everything else as users import it; what they do not is no link."""
    exports = obj.package.exports or ()
    owner = obj if obj.is_class else obj.parent
    if isinstance(owner, griffe.Class) and name in owner.all_members and not name.startswith("_"):
        path = f"{obj.package.path}.{owner.name}" if owner.name in exports else owner.path
        return f"[`{name}`][{path}.{name}]"
    if name in exports:
        return f"[`{name}`][{obj.package.path}.{name}]"
    return f"`{name}`"


def _fenced(match: re.Match[str]) -> str:
    code = textwrap.dedent(match["block"]).strip("\n")
    try:
        ast.parse(code)
        language = "python"
    except SyntaxError:
        language = "text"
    before = f"{match['before']}:\n\n" if match["before"].strip() else ""
    return f"{before}```{language}\n{code}\n```\n"
