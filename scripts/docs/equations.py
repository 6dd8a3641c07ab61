"""Equations as MathML, which browsers draw themselves: no script. A hook of mkdocs.yml."""

from __future__ import annotations

import html
import re
from importlib.metadata import distribution
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# What few machines have, a font for equations, comes with this package. site.css names the file.
_FONT = Path(str(distribution("ziamath").locate_file("ziamath/fonts/STIXTwoMath-Regular.ttf")))

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_SIGN = re.compile(r"(<mo[^>]*>(?:&#x0003D;|&#x00028;|\()</mo>)<mo>&#x02212;</mo>")  # a minus after "=" or "("
_LOG = '<mo lspace="0.12em" rspace="0.12em">log</mo>'  # so that "2 log x" has its spaces


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Adds the font."""
    files.append(File.generated(config, f"fonts/{_FONT.name}", abs_src_path=str(_FONT)))


def on_page_content(content: str, *, page: Page, **_: object) -> str:
    """The page with what pymdownx.arithmatex marked drawn. The search index skips it."""

    def drawn(match: re.Match[str]) -> str:
        tag, latex = match[1], html.unescape(match[2]).strip()
        mathml = convert(latex, display="block" if tag == "div" else "inline")
        if "\\" in mathml:  # a command that it does not know is left as it is
            raise PluginError(f"{page.file.src_uri}: an equation that cannot be drawn: {latex}")
        mathml = _SIGN.sub(r'\1<mo form="prefix">&#x02212;</mo>', mathml)
        mathml = mathml.replace("<mi>log</mi>", _LOG)
        return f'<{tag} class="equation" data-search-exclude>{mathml}</{tag}>'

    return _EQUATION.sub(drawn, content)
