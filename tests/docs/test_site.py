"""The site: builds without a warning, links lead somewhere, nothing comes from elsewhere, the search finds things."""

from __future__ import annotations

import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers_blocks import PAGES, ROOT, headings, without_blocks

import attbalance_ext

pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
from mkdocs.exceptions import PluginError

from scripts.docs import pages as includes

# What a browser fetches by itself, as opposed to what a reader may click on.
FETCHED = {
    "audio": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
}


class Page(HTMLParser):
    """The anchors, links and fetched files of one built page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attributes if value is not None}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        self.fetched += [found[name] for name in FETCHED.get(tag, ()) if name in found]
        self.fetched += re.findall(r"url\(['\"]?([^'\")]+)", found.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: what is not logged is not counted by --strict.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        build, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {str(file.relative_to(site)): Page(file.read_text()) for file in site.rglob("*.html")}


# One test after the other on one build: apart, each worker of `-n` would build its own.
def test_site(site: Path, pages: dict[str, Page]) -> None:
    every_page_is_there(pages)
    links_lead_somewhere(site, pages)
    nothing_comes_from_elsewhere(site, pages)
    the_reference_is_complete(pages)
    equations_are_drawn(site)
    programs_are_shown(site)
    search_finds(site)


def every_page_is_there(pages: dict[str, Page]) -> None:
    expected = {f"{file.stem}.html" for file in (ROOT / "docs").glob("*.md")}
    assert expected <= set(pages)
    home = {posixpath.normpath(link.partition("#")[0]) for link in pages["index.html"].links}
    assert expected <= home | {"index.html", "."}, "a page that the navigation does not name"


def links_lead_somewhere(site: Path, pages: dict[str, Page]) -> None:
    assert not [fault for name in pages for fault in link_faults(name, site, pages)]


def link_faults(name: str, site: Path, pages: dict[str, Page]) -> Iterator[str]:
    for link in pages[name].links + pages[name].fetched:
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", path):
            continue
        # 404.html is shown at any depth, so its links begin at the root.
        path = posixpath.join(posixpath.dirname(name), unquote(path).lstrip("/")) if path else name
        target = posixpath.normpath(path)
        if not (site / target).is_file():
            yield f"{name}: no file {link}"
        elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
            yield f"{name}: no anchor {link}"


def nothing_comes_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    outside = re.compile(r"(?:\w+:)?//")
    fetched = {link for page in pages.values() for link in page.fetched}
    for sheet in site.rglob("*.css"):
        fetched |= set(re.findall(r"(?:url\(|@import )['\"]?([^'\")]+)", sheet.read_text()))
    assert not [link for link in fetched if outside.match(link)]


def the_reference_is_complete(pages: dict[str, Page]) -> None:
    missing = [name for name in attbalance_ext.__all__ if f"attbalance_ext.{name}" not in pages["api.html"].anchors]
    assert not missing, "add them to docs/api.md"


def equations_are_drawn(site: Path) -> None:
    concepts = (site / "concepts.html").read_text()
    assert concepts.count("<math") > 40
    assert "arithmatex" not in concepts
    sheet = (site / "stylesheets/site.css").read_text()
    (font,) = re.findall(r'url\("\.\./([^"]+)"\)', sheet)
    assert (site / font).stat().st_size > 1e6


def programs_are_shown(site: Path) -> None:
    text = "".join(file.read_text() for file in site.glob("*.html"))
    programs = [str(file.relative_to(ROOT)) for file in ROOT.glob("examples/**/*.py")]
    assert not [program for program in programs if f"All of {program}" not in text]


def search_finds(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text())
    titles = [entry["title"] for entry in index["docs"]]
    text = " ".join(entry["title"] + " " + entry["text"] for entry in index["docs"])
    wanted = [*attbalance_ext.__all__, "torch.compile", "RefCOCO", "FSDP2", "GradScaler", "Spearman", "NaN"]
    assert not [word for word in wanted if word not in text]
    assert {"My loss is NaN", "TransVG", "Install"} <= {re.sub(r"<[^>]+>", "", title) for title in titles}
    assert "<math" not in text
    # Opened as files, pages cannot fetch the index: they read it as a script.
    assert (site / "search/search_index.js").read_text().startswith("var __index = ")
    assert "iframe-worker.js" in (site / "index.html").read_text()


def test_links_on_github() -> None:
    """Links between Markdown files, as they are read without the site."""
    faults = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^()\s]+)\)", without_blocks(page.read_text())):
            path, _, anchor = target.partition("#")
            if re.match(r"\w+:", path):
                continue
            file = page.parent / path if path else page
            if not file.exists() or (anchor and anchor not in map(includes.slugify, headings(file.read_text()))):
                faults.append(f"{page.name}: {target}")
    assert not faults


README = (
    "title\n\n# T\n\ntop\n\n## A b, c\n\n[x](docs/faq.md#y)\n\n```sh\n## no\n```\n\n### Deep\n\n[s](s.py)\n\n## Z\n"
)


def test_what_pages_include(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(includes, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    for name, text in {"README.md": README, "docs/faq.md": "", "s.py": "A = 1\n"}.items():
        (tmp_path / name).write_text(text)

    def expand(comment: str) -> str:
        return includes.expand(f"# Page\n\n### Here\n\n<!-- {comment} -->", "docs/page.md").split("### Here\n\n")[1]

    assert expand("include README.md#top") == "top"
    # The link is the page's own, headings hang below the page's, and the one to no page of the site is text.
    assert expand("include README.md#a-b-c") == "[x](faq.md#y)\n\n```sh\n## no\n```\n\n#### Deep\n\ns"
    assert expand("include s.py") == '??? example "All of s.py"\n\n    ```python\n    A = 1\n    ```\n'
    assert expand("reference s.A") == "::: s.A"
    assert "+A = 1" not in expand("compare s.py s.py")
    for wrong in ("include gone.py", "include README.md#gone", "reference s.B", "compare s.py gone.py"):
        with pytest.raises(PluginError, match=r"gone|s\.B"):
            expand(wrong)


def test_faults_are_seen(tmp_path: Path) -> None:
    (tmp_path / "here.html").write_text(
        '<h2 id="a">A</h2><a href="#b">b</a><a href="there.html#c">c</a><a href="gone.html">gone</a>'
        '<a href="#a">a</a><a href="https://example.org">elsewhere</a><img src="gone.png">'
    )
    (tmp_path / "there.html").write_text("<script src='//example.org/x.js'></script>")
    pages = {file.name: Page(file.read_text()) for file in tmp_path.glob("*.html")}
    assert list(link_faults("here.html", tmp_path, pages)) == [
        "here.html: no anchor #b",
        "here.html: no anchor there.html#c",
        "here.html: no file gone.html",
        "here.html: no file gone.png",
    ]
    with pytest.raises(AssertionError):
        nothing_comes_from_elsewhere(tmp_path, pages)
