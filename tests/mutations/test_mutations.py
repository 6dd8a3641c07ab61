"""The lists fit the code as it is, and a wrong edit that no test notices is said to have survived."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest

from tests.mutations.catalogue import Mutation, Suite, WrongEntry, load_lists
from tests.mutations.run import BROKEN, CAUGHT, STALE, SURVIVED, Results, run
from tests.mutations.tree import Tree

ROOT = Path(__file__).parents[2]
LISTS = load_lists()
MUTATIONS = [mutation for one in LISTS for mutation in one.mutations]


def brackets(text: str) -> list[int]:
    """How many more of each kind are opened than closed."""
    return [text.count(pair[0]) - text.count(pair[1]) for pair in ("()", "[]", "{}")]


@functools.cache
def meaning(source: str) -> str:
    """What is left of Python without comments and layout."""
    return ast.dump(ast.parse(source))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_edit_still_applies(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    edited = mutation.applied_to(source)
    assert edited != source
    if mutation.file.endswith(".py"):
        assert ast.dump(ast.parse(edited)) != meaning(source)
    else:
        assert brackets(mutation.text) == brackets(mutation.replacement)
    for test in mutation.suite.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).exists(), path
        assert not name or re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), test


def test_every_area_has_some_and_csrc_is_compiled() -> None:
    assert len(MUTATIONS) >= 60
    assert min(len(one.mutations) for one in LISTS) >= 5
    for one in LISTS:
        assert (one.builds is not None) == any(mutation.file.startswith("csrc/") for mutation in one.mutations)


def test_the_table_counts_them() -> None:
    """In CONTRIBUTING.md."""
    found = dict(re.findall(r"^\| (.+?) +\| +(\d+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    counts = {one.area: str(len(one.mutations)) for one in LISTS}
    assert found == {**counts, "all": str(len(MUTATIONS))}


# --- the command ------------------------------------------------------------------------------------------------------

CODE = """
def larger(a, b):
    return a if a > b else b


def smaller(a, b):
    return a if a < b else b
"""
TESTS = """
from code_under_test import larger, smaller


def test_larger():
    assert larger(1, 2) == 2


def test_smaller():
    assert smaller(1, 1) == 1
"""
LIST = """
area = "planted"
suites.both = {tests = ["test_it.py"]}
suites.none = {tests = ["test_it.py"], select = "nothing_has_this_name"}

[[mutation]]
name = "noticed"
file = "code_under_test.py"
wrong = "the smaller one"
text = "a > b"
replacement = "a < b"
suite = "both"

[[mutation]]
name = "unnoticed"
file = "code_under_test.py"
wrong = "the larger one"
text = "a if a < b"
replacement = "a if a > b"
suite = "both"

[[mutation]]
name = "ambiguous"
file = "code_under_test.py"
wrong = "which of the two?"
text = "else b"
replacement = "else a"
suite = "both"

[[mutation]]
name = "no import"
file = "code_under_test.py"
wrong = "no test can run"
text = "def larger(a, b):"
replacement = "def largest(a, b):"
suite = "both"

[[mutation]]
name = "no tests"
file = "code_under_test.py"
wrong = "there is nobody to notice"
text = "a > b"
replacement = "a >= b"
suite = "none"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project of one module, its tests and a list of edits."""
    root = tmp_path / "checkout"
    for path, text in {
        "code_under_test.py": CODE,
        "test_it.py": TESTS,
        "lists/planted.toml": LIST,
        "attbalance_ext/kernels/lib/libattbalance_cpu.so": "",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


def test_a_survivor_is_said_and_only_what_was_caught_is_not_tried_again(checkout: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def attempt() -> dict[str, str]:
        said.clear()
        found = run(
            load_lists(checkout / "lists"),
            source=checkout,
            folder=tmp_path / "copies",
            results=Results(tmp_path / "results.json"),
            imported=(),
            say=said.append,
        )
        return {name.removeprefix("planted/"): outcome.verdict for name, outcome in found.items()}

    expected = {
        "noticed": CAUGHT,
        "unnoticed": SURVIVED,
        "ambiguous": STALE,
        "no import": BROKEN,
        "no tests": BROKEN,
    }
    assert attempt() == expected
    assert said[0] == "5 mutations, 0 of them caught before"
    assert "test_larger" in next(line for line in said if "planted/noticed" in line)
    assert (checkout / "code_under_test.py").read_text() == CODE
    assert (tmp_path / "copies/copy-0/code_under_test.py").read_text() == CODE

    (checkout / "test_it.py").write_text(TESTS.replace("smaller(1, 1) == 1", "smaller(1, 2) == 1"))
    (tmp_path / "copies/copy-0/code_under_test.py").write_text("left behind by a killed run")
    assert attempt() == {**expected, "unnoticed": CAUGHT}
    assert said[0] == "5 mutations, 0 of them caught before"  # other tests than before
    assert attempt() == {**expected, "unnoticed": CAUGHT}
    assert said[0] == "5 mutations, 2 of them caught before"


def test_a_loop_without_end_is_told_by_its_work(checkout: Path, tmp_path: Path) -> None:
    tree = Tree(checkout, tmp_path / "copy", imported=())
    tree.update()
    (tmp_path / "copy/code_under_test.py").write_text("while True:\n    pass\n")
    found = tree.test(Suite(("test_it.py",)), limit=2)
    tree.close()
    assert (found.passed, found.collected) == (False, True)
    # The system's two clocks of work, the limit's and the account's, need not agree.
    assert re.fullmatch(r"ended by SIGXCPU after [123] s of work", found.said)


def test_entries_that_cannot_be_used(tmp_path: Path) -> None:
    for wrong, message in (
        (LIST.replace('suite = "none"', 'suite = "many"'), "planted/no tests: there is no suite 'many'"),
        (LIST.replace('wrong = "the smaller one"\n', ""), "planted/noticed: its fields must be file, name"),
        (LIST.replace('"unnoticed"', '"noticed"'), "planted.toml has several of the name planted/noticed"),
        (f'builds = "cubin"\n{LIST}', "planted.toml: builds must be one of cpu, emulation, got 'cubin'"),
        (LIST.replace('suite = "none"', 'suite = "both"'), "planted.toml: no mutation uses the suites none"),
    ):
        (tmp_path / "planted.toml").write_text(wrong)
        with pytest.raises(WrongEntry, match=re.escape(message)):
            load_lists(tmp_path)
