"""The page about studies, and the same as Markdown and figures."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers_study import ACCURACY, add_records, make_study
from typer.testing import CliRunner

from attbalance_ext.grounding.commands import app
from attbalance_ext.grounding.errors import UserError
from attbalance_ext.grounding.experiment.findings import findings
from attbalance_ext.grounding.report import write_report
from attbalance_ext.grounding.report.studies import markdown, study_page, write_figures


class Page(HTMLParser):
    """Addresses that the page asks for, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    spec = make_study(tmp_path)
    add_records(spec, tmp_path / "records")
    return spec.path


def test_page_is_whole_and_asks_for_nothing(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "page.html"
    result = CliRunner().invoke(app, ["report", "--study", str(study), "--out", str(out)])
    assert result.exit_code == 0, result.output
    page = Page(out.read_text())
    assert all(address.startswith("data:") for address in page.addresses)
    pictures = [a for a in page.addresses if a.startswith("data:image/svg+xml;base64,")]
    assert len(pictures) == 1 + 2 * 3  # all comparisons; curves, attention, rho of each data set
    for picture in pictures:
        ElementTree.fromstring(base64.b64decode(picture.split(",", 1)[1]))
    text = " ".join(" ".join(page.words).split())
    assert "32 of 32 cells have been run" in text
    assert "AttBalance plain +10.0 (+8.7 to +11.3) 4 < 0.001" in text
    assert "AttBalance against plain" not in text  # it helps: nothing to explain
    assert re.search(r"noise against plain: \+0\.5 \(-\S+ to \+\S+\) points, p = 0\.\d+: not told apart\. In", text)
    assert re.search(r"worse against AttBalance: -10\.2 \(\S+ to \S+\) points, p \S+ \S+: worse\.", text)
    assert "commit abcdef012345" in text


def test_where_it_does_not_help_the_page_says_why(tmp_path: Path) -> None:
    spec = make_study(tmp_path)
    add_records(spec, tmp_path, {"plain": ACCURACY["full"], "full": ACCURACY["plain"]})
    sentence = study_page(findings(spec, tmp_path)).sections[0].sentences[0]
    assert sentence.startswith("AttBalance against plain: -10.0 (-11.3 to -8.7) points, p < 0.001: worse. ")
    assert "attention in the box goes from 0.60 to 0.51 (as used: 0.30 to 0.25)" in sentence
    assert "rho from 0.60 to 0.51" in sentence
    assert "weighted by 1.68 on average" in sentence


def test_one_seed_is_no_finding(tmp_path: Path) -> None:
    spec = make_study(tmp_path)
    add_records(spec, tmp_path, {"plain": (0.5,), "full": (0.9,)})
    section = study_page(findings(spec, tmp_path)).sections[0]
    assert section.sentences == ["AttBalance against plain: +40.0 points, of one seed; nothing can be said yet."]
    assert section.results.rows[1][2] == "90.0"
    assert section.comparisons is not None
    assert section.comparisons.rows == [["AttBalance", "plain", "+40.0", "1", ""]]


def test_tables_as_markdown(study: Path) -> None:
    result = CliRunner().invoke(app, ["report", "--study", str(study), "--markdown"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "`transvg-tiny`, `builtin:referit`" in lines
    row = next(line for line in lines if line.startswith("| AttBalance |"))
    assert row.startswith("| AttBalance | 4 | 60.5 ± 3.3 | 30.2 ± 1.7 | 0.505 ± 0.033 | 50.5 / 60.5 / 70.5 |")
    assert "| AttBalance | plain | +10.0 (+8.7 to +11.3) | 4 | < 0.001 |" in lines


def test_figures_say_their_sample_sizes(study: Path, tmp_path: Path) -> None:
    from attbalance_ext.grounding.experiment.spec import load_spec

    found = findings(load_spec(study), study.parent / "records")
    written = write_figures(found, tmp_path / "figures")
    names = sorted(path.name for path in written)
    assert len(set(names)) == 7
    rho = [path.read_text() for path in written if "does-looking-help" in path.name]
    assert len(rho) == 2
    assert all("each rho over 1,234 sentences, 4 seeds a point" in text for text in rho)
    differences = next(path for path in written if path.name == "study-differences.svg").read_text()
    assert differences.count("(n = 4)") == 6
    again = write_figures(found, tmp_path / "again")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(written, again, strict=True))


def test_markdown_of_a_part_says_so(tmp_path: Path) -> None:
    spec = make_study(tmp_path)
    add_records(spec, tmp_path, {"plain": ACCURACY["plain"]})
    assert "8 of 32 cells have been run" in markdown(findings(spec, tmp_path))


def test_neither_runs_nor_studies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a report needs a run or a study"):
        write_report([], tmp_path / "page.html", versions={})
