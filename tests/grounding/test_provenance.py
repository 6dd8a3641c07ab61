"""Which code made a result: the commit, and whether it is all of the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from attbalance_ext.grounding import provenance


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit, taken for the one that this code lies in."""
    folder = tmp_path / "checkout"
    (folder / "results").mkdir(parents=True)
    for name in ("code.py", "results/old.json", ".gitignore"):
        (folder / name).write_text("ignored\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "All")
    monkeypatch.setattr(provenance, "ROOT", folder)
    return folder


def test_a_commit_and_nothing_else(checkout: Path) -> None:
    found, modified = provenance.commit("results")
    assert found is not None
    assert len(found) == 12
    assert git(checkout, "rev-parse", "HEAD").startswith(found)
    assert not modified
    (checkout / "ignored").write_text("")
    assert provenance.commit() == (found, False)


@pytest.mark.parametrize("name", ["code.py", "new.py", "results.py"])
def test_changed_and_new_code_is_a_modification(name: str, checkout: Path) -> None:
    clean, _ = provenance.commit("results")
    (checkout / name).write_text("changed\n")
    assert provenance.commit("results") == (clean, True)


def test_results_are_none(checkout: Path) -> None:
    """Each study would mark the next one as of modified code."""
    (checkout / "results" / "new.json").write_text("")
    (checkout / "results" / "old.json").write_text("")
    found, modified = provenance.commit("results", "more")
    assert not modified
    assert provenance.commit() == (found, True)


def test_outside_a_checkout_nothing_is_known(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = checkout / "site-packages"  # installed below somebody else's checkout
    inside.mkdir()
    monkeypatch.setattr(provenance, "ROOT", inside)
    assert provenance.commit() == (None, True)
    (inside / ".git").write_text("gitdir: nowhere")
    assert provenance.commit() == (None, True)


def test_without_git_nothing_is_known(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert provenance.commit() == (None, True)


def test_this_code_knows_its_processor() -> None:
    assert isinstance(provenance.cpu_model(), str)
