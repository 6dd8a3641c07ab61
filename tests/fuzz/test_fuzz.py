"""The fuzzer itself, and some of its cases in every run of the tests."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import poisoned_memory
from helpers_attention import literal, make_problem
from helpers_exact import exact, extreme_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from attbalance_ext.kernels import ops
from attbalance_ext.kernels.choose import BACKENDS as REGISTERED
from tests.fuzz.kinds import BACKENDS, KINDS, draw, fit, judge, strategy
from tests.fuzz.session import CORPUS, State, load, run, state_path
from tests.fuzz.shrink import shrink
from tests.fuzz.space import Case, Space
from tests.fuzz.terms_truth import TERMS, truth_of

BY_NAME = {backend.name: backend for backend in BACKENDS.values()}
if "cpu" not in REGISTERED["triton"].devices:
    del BY_NAME["triton"]

# --- properties ------------------------------------------------------------------------------------------------------

EXAMPLES = {
    "cpu": {"terms": 120, "loss": 80, "refusals": 80},
    "cuda": {"terms": 60, "loss": 40, "refusals": 40},
    "triton": {"terms": 6, "loss": 6, "refusals": 40},
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("backend", list(BY_NAME))
def test_any_case(backend: str, kind: str) -> None:
    """Terms, losses, gradients and refusals of any call, as tests/fuzz/ judges them."""

    @settings(max_examples=EXAMPLES[backend][kind])
    @given(case=strategy(kind, BY_NAME[backend]))
    def check(case: Case) -> None:
        with poisoned_memory(), np.errstate(all="ignore"):
            assert judge(kind, case, ["reference", backend]) == []

    check()


SAVED = sorted(CORPUS.glob("*.json"))


@pytest.mark.parametrize("path", SAVED, ids=[path.stem for path in SAVED])
@pytest.mark.parametrize("backend", list(BY_NAME))
def test_what_failed_once(backend: str, path: Path) -> None:
    saved = json.loads(path.read_text())
    case = fit(KINDS[saved["kind"]], saved["case"], BY_NAME[backend])
    with poisoned_memory(), np.errstate(all="ignore"):
        assert judge(saved["kind"], case, ["reference", backend]) == []


# --- the judge is right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [None, torch.float64])
def test_the_truth_is_that_of_the_literal_equations(teacher: torch.dtype | None) -> None:
    double = (torch.float64,)
    problem = make_problem(
        query_dtype=double, key_dtype=double, teacher_dtype=teacher, region="weights", padded=True, layers=3
    )
    expected, found = literal(problem), truth_of(problem, TERMS)
    for name in TERMS:
        torch.testing.assert_close(getattr(found, name), getattr(expected.terms, name), rtol=1e-10, atol=1e-13)
    assert torch.equal(found.valid, expected.terms.valid)
    for layer in range(3):
        for kind in ("query", "key"):
            wanted = getattr(expected, f"grad_{kind}")[layer]
            torch.testing.assert_close(getattr(found, f"grad_{kind}")[layer], wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("distance", [1.0, 1e-6])
def test_the_truth_keeps_its_digits_at_both_ends(distance: float) -> None:
    problem = extreme_problem([1e-30, 1e-4, 0.499, 0.501, 1 - 1e-8], distance, torch.float64)
    expected, found = exact(problem), truth_of(problem, TERMS)
    for name in TERMS:
        torch.testing.assert_close(getattr(found, name), getattr(expected.terms, name), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.grad_key[0], expected.grad_key[0], rtol=1e-6, atol=1e-20)


# --- it finds what is wrong ------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, op: str, edit: Callable[..., Any]) -> None:
    """Backend "cpu" does what `edit(right, *arguments)` says instead."""
    right = getattr(torch.ops.attbalance_ext, op)

    class Wrong:
        def __getattr__(self, backend: str) -> Callable[..., Any]:
            overload = getattr(right, backend)
            return (lambda *arguments: edit(overload, *arguments)) if backend == "cpu" else overload

    monkeypatch.setattr(ops.torch.ops.attbalance_ext, op, Wrong())


def without_padding(right: Callable[..., Any], *arguments: Any) -> Any:
    """Forgets the mask from the ninth token on."""
    padding = arguments[6]
    if padding is not None and padding.shape[1] > 8:
        padding = padding.clone()
        padding[:, 8:] = False
    return right(*arguments[:6], padding, *arguments[7:])


def slightly_off(right: Callable[..., Any], *arguments: Any) -> Any:
    """The gradient by the keys of a second layer, by a thousandth."""
    grad_query, grad_key, grad_dot = right(*arguments)
    return grad_query, [g * (1 + 1e-3 * (layer == 1)) for layer, g in enumerate(grad_key)], grad_dot


def wrong_sign(right: Callable[..., Any], *arguments: Any) -> Any:
    """Of the gradient by MRC where the difficulty is the last layer's."""
    loss, samples, rho, grad_rac, grad_mrc, grad_pred = right(*arguments)
    return loss, samples, rho, grad_rac, grad_mrc * (-1 if arguments[13] == 2 else 1), grad_pred


# What is wrapped and how, the kind of case that shows it, and what sizes it shrinks to.
BUGS: dict[str, tuple[str, Callable[..., Any], str, dict[str, int]]] = {
    "mask": ("attention_terms", without_padding, "terms", {"tokens": 20, "layers": 1}),
    "thousandth": ("attention_terms_backward", slightly_off, "terms", {"layers": 2, "tokens": 3, "batch": 1}),
    "sign": ("balanced_loss", wrong_sign, "loss", {"layers": 1, "batch": 1}),
}


@pytest.mark.parametrize(("op", "edit", "kind", "smallest"), BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_found_shrunk_and_saved(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    op: str,
    edit: Callable[..., Any],
    kind: str,
    smallest: dict[str, int],
) -> None:
    said: list[str] = []
    with monkeypatch.context() as planted:
        plant(planted, op, edit)
        state = run(State("cpu", 0), cases=120, states=tmp_path, corpus=tmp_path / "corpus", say=said.append)
        (path,) = list((tmp_path / "corpus").glob(f"{kind}-*.json"))[:1]
        saved = json.loads(path.read_text())
        assert judge(saved["kind"], saved["case"], ["reference", "cpu"]) == saved["found"] != []
    assert all("cpu: " in fault for fault in state.faults)
    assert any(str(path) in line for line in said)
    assert all(saved["case"][name] <= size for name, size in smallest.items())
    simplest = sum(saved["case"][name] == values[0] for name, values in KINDS[kind].space.fields.items())
    assert simplest > 0.8 * len(KINDS[kind].space.fields)
    assert judge(saved["kind"], saved["case"], ["reference", "cpu"]) == []


def test_a_backend_that_refuses_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no")

    case = KINDS["terms"].space.draw(random.Random(0))
    plant(monkeypatch, "attention_terms", refuse)
    assert judge("terms", fit(KINDS["terms"], case, BACKENDS["cpu"]), ["reference", "cpu"]) == ["cpu: RuntimeError: no"]


# --- drawing, shrinking, going on ------------------------------------------------------------------------------------


def test_a_seed_s_cases_are_always_the_same() -> None:
    backend = BACKENDS["cpu"]
    cases = [draw(3, number, backend) for number in range(100)]
    assert cases == [draw(3, number, backend) for number in range(100)]
    assert {kind for kind, _ in cases} == set(KINDS)
    assert json.loads(json.dumps(cases)) == [list(case) for case in cases]
    assert cases != [draw(4, number, backend) for number in range(100)]


@given(case=strategy("terms", BACKENDS["triton"]))
def test_cases_fit_their_backend(case: Case) -> None:
    assert KINDS["terms"].cost(case, BACKENDS["triton"].row) <= BACKENDS["triton"].work
    assert "float64" not in (case["query_dtype"], case["key_dtype"])


@given(
    case=st.fixed_dictionaries({"a": st.sampled_from(range(100)), "b": st.sampled_from((0, 1))}),
    least=st.integers(0, 99),
)
def test_shrinking_ends_at_the_simplest_that_fails(case: Case, least: int) -> None:
    space = Space({"a": range(100), "b": (0, 1)})
    if case["a"] >= least:
        assert shrink(case, space, lambda other: other["a"] >= least) == {"a": least, "b": 0}


def test_a_run_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    places = {"states": tmp_path, "corpus": tmp_path / "corpus", "say": lambda text: None}
    run(load("cpu", 5, tmp_path), cases=8, **places)
    first = load("cpu", 5, tmp_path)
    assert first.done == 8
    both = run(first, cases=20, **places)
    once = run(State("cpu", 5), cases=20, **places)
    assert (both.done, both.kinds, both.faults) == (once.done, once.kinds, {})
    assert not (tmp_path / "corpus").exists()
    assert run(load("cpu", 5, tmp_path), seconds=0, **places).done == 20


def test_a_run_that_was_ended_says_in_which_case(tmp_path: Path) -> None:
    said: list[str] = []
    path = state_path("cpu", 0, tmp_path)
    State("cpu", 0, done=3).save(path)
    path.with_suffix(".running").write_text("4")
    run(load("cpu", 0, tmp_path), cases=4, states=tmp_path, say=said.append)
    assert "ended in case 4" in said[0]
    assert not path.with_suffix(".running").exists()


def test_the_command() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--only", "0"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing is wrong" in done.stdout
