"""No call leaves memory behind: the size of a process after 10 000 of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from helpers_attention import make_problem, solve
from helpers_loss import make_loss_problem, solve_loss
from torch import Tensor, nn

from attbalance_ext import AttBalanceConfig, AttentionTap, BoxRegion, attention_terms

Call = Callable[[], object]

CALLS = 10_000
WARM_UP = 2_000
# Bytes a call. The smallest tensor there is has 64 bytes of data, and is several times larger itself.
ALLOWED = 40


def resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measured(prepare: Callable[[], Call], calls: int) -> float:
    torch.set_num_threads(1)
    call = prepare()
    for _ in range(WARM_UP):
        call()
    before = resident()
    for _ in range(calls):
        call()
    return (resident() - before) / calls


def growth(prepare: Callable[[], Call], calls: int = CALLS) -> float:
    """By how many bytes a call a process grows, when earlier calls have filled every cache.

    In a process of its own: what other tests have freed in this one would take in what is kept.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measured, prepare, calls).result()


def terms() -> Call:
    problem = make_problem(layers=1, batch=1, tokens=31, width=7, padded=True)
    return lambda: solve(problem, "cpu")


def loss() -> Call:
    problem, config = make_loss_problem(layers=1, batch=2), AttBalanceConfig()
    return lambda: solve_loss(problem, config, "cpu")


def tapped_layer() -> Call:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    tap = AttentionTap([layer], query=0, visual=slice(1, 10))
    tokens, boxes = torch.randn(1, 10, 8, requires_grad=True), torch.full((1, 4), 0.5)

    def step() -> None:
        with tap.recording():
            out, _ = layer(tokens, tokens, tokens, need_weights=False)
        terms = attention_terms(tap.attention(), BoxRegion(boxes, (3, 3)), backend="cpu")
        (out.sum() + terms.rac.sum()).backward()

    return step


def kept() -> Call:
    """One of the smallest tensors a call."""
    problem, tensors = make_problem(layers=1, batch=1, tokens=31, width=7), list[Tensor]()
    return lambda: tensors.append(solve(problem, "cpu").terms.rac)


def test_attention_terms() -> None:
    assert growth(terms) < ALLOWED


def test_balanced_loss() -> None:
    assert growth(loss) < ALLOWED


def test_a_tapped_layer() -> None:
    assert growth(tapped_layer, 2_000) < ALLOWED


def test_what_is_kept_is_seen() -> None:
    assert growth(kept, 2_000) > ALLOWED
