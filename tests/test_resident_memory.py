"""No call leaves memory behind: the size of the process after 10 000 of them."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch
from helpers_attention import make_problem, solve
from helpers_loss import make_loss_problem, solve_loss
from torch import Tensor, nn

from attbalance_ext import AttBalanceConfig, AttentionTap, BoxRegion, attention_terms

CALLS = 10_000
WARM_UP = 2_000
# Bytes a call. The smallest tensor there is has 64 bytes of data, and is several times larger itself.
ALLOWED = 40


def resident() -> int:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what earlier tests have freed would take in what is kept
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(call: Callable[[], object], calls: int = CALLS) -> float:
    """By how many bytes a call the process grows, when earlier ones have filled every cache."""
    for _ in range(WARM_UP):
        call()
    before = resident()
    for _ in range(calls):
        call()
    return (resident() - before) / calls


def test_attention_terms() -> None:
    problem = make_problem(layers=1, batch=1, tokens=31, width=7, padded=True)
    assert growth(lambda: solve(problem, "cpu")) < ALLOWED


def test_balanced_loss() -> None:
    problem, config = make_loss_problem(layers=1, batch=2), AttBalanceConfig()
    assert growth(lambda: solve_loss(problem, config, "cpu")) < ALLOWED


def test_a_tapped_layer() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    tap = AttentionTap([layer], query=0, visual=slice(1, 10))
    tokens, boxes = torch.randn(1, 10, 8, requires_grad=True), torch.full((1, 4), 0.5)

    def step() -> None:
        with tap.recording():
            out, _ = layer(tokens, tokens, tokens, need_weights=False)
        terms = attention_terms(tap.attention(), BoxRegion(boxes, (3, 3)), backend="cpu")
        (out.sum() + terms.rac.sum()).backward()

    assert growth(step, 2_000) < ALLOWED


def test_what_is_kept_is_seen() -> None:
    """One of the smallest tensors a call."""
    problem, kept = make_problem(layers=1, batch=1, tokens=31, width=7), list[Tensor]()
    assert growth(lambda: kept.append(solve(problem, "cpu").terms.rac), 2_000) > ALLOWED
