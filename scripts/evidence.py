"""Writes the tables and figures of docs/evidence.md anew from the committed records.

    python -m scripts.evidence

A table stands between `<!-- study: experiments/NAME.toml -->` and `<!-- end -->`; a figure is any image that the page
shows from `images/evidence/`.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from attbalance_ext.grounding.experiment.findings import Findings, findings
from attbalance_ext.grounding.experiment.spec import load_spec
from attbalance_ext.grounding.report.studies import markdown, write_figures

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "evidence.md"
FIGURES = ROOT / "docs" / "images" / "evidence"
TABLE = re.compile(r"(<!-- study: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
SHOWN = re.compile(r"images/evidence/([\w.+-]+\.svg)")


def studies(text: str) -> dict[str, Findings]:
    """The studies that the page has tables of, by the name of their file."""
    names = dict.fromkeys(name for _, name, _, _ in TABLE.findall(text))
    return {name: findings(load_spec(ROOT / name), ROOT / "experiments" / "records") for name in names}


def with_tables(text: str) -> str:
    """The page with its tables made anew."""
    found = studies(text)
    return TABLE.sub(lambda match: f"{match[1]}\n{markdown(found[match[2]])}\n\n{match[4]}", text)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_tables(text), encoding="utf-8")
    shown = set(SHOWN.findall(text))
    with tempfile.TemporaryDirectory() as folder:
        written = {path.name: path for found in studies(text).values() for path in write_figures(found, Path(folder))}
        if missing := shown - written.keys():
            raise SystemExit(
                f"no study has these figures: {', '.join(sorted(missing))}; there is: {', '.join(written)}"
            )
        shutil.rmtree(FIGURES, ignore_errors=True)
        FIGURES.mkdir(parents=True)
        for name in sorted(shown):
            shutil.copy(written[name], FIGURES / name)
    print(f"{PAGE.relative_to(ROOT)}: tables of {', '.join(studies(text))}, {len(shown)} figures")


if __name__ == "__main__":
    main()
