"""Which tokens are meant: what may be given, what is a view, and where an index is kept."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from helpers_hosts import Host
from helpers_sync import no_host_sync
from torch import Tensor

from attbalance_ext import AttentionTap
from attbalance_ext.tokens import Tokens

LENGTH = 9
SCATTERED = [7, 2, 3]


@pytest.mark.parametrize(
    ("given", "meant", "is_view"),
    [
        (slice(2, 7), [2, 3, 4, 5, 6], True),
        (slice(-3, None), [6, 7, 8], True),
        (slice(1, None, 3), [1, 4, 7], True),
        (slice(5, 5), [], True),
        ([2, 3, 4], [2, 3, 4], True),
        (range(1, 9, 2), [1, 3, 5, 7], True),
        ((4,), [4], True),
        ((-1,), [8], False),
        (SCATTERED, SCATTERED, False),
        ([-1, 0, -9 + 1], [8, 0, 1], False),
        ([4, 3, 2], [4, 3, 2], False),
        (torch.tensor(SCATTERED), SCATTERED, False),
        (torch.arange(9) > 5, [6, 7, 8], True),
        (torch.arange(9) % 4 == 1, [1, 5], True),
        (torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 1]).bool(), [0, 1, 3, 8], False),
    ],
    ids=str,
)
def test_what_is_meant(given: Any, meant: list[int], is_view: bool) -> None:
    tokens = Tokens("visual", given)
    x = torch.randn(2, LENGTH, 4)
    tokens.check(LENGTH, "key")
    assert torch.equal(tokens.of(x), x[:, torch.tensor(meant, dtype=torch.int64)])
    assert tokens.number(LENGTH) == len(meant)
    assert tokens.is_view is is_view
    assert (tokens.of(x).data_ptr() in range(x.data_ptr(), x.data_ptr() + x.nbytes) or not meant) is is_view
    spread = tokens.spread(tokens.of(x), LENGTH)
    expected = torch.zeros_like(x)
    expected[:, meant] = x[:, meant]
    assert torch.equal(spread, expected)
    assert torch.equal(tokens.spread(tokens.of(x[..., 0]), LENGTH), expected[..., 0])


def test_one_token() -> None:
    tokens = Tokens("query", -2, one=True)
    x = torch.randn(2, LENGTH, 4)
    assert not tokens.several
    assert torch.equal(tokens.of(x), x[:, 7])
    assert torch.equal(tokens.spread(x[:, 7], LENGTH).sum(1), x[:, 7])


@pytest.mark.parametrize(
    ("given", "end"),
    [
        (slice(2, 7), 7),
        (slice(None, 7), 7),
        (slice(2, None), None),
        (slice(2, -1), None),
        (slice(-3, 9), None),
        ([2, 3], 4),
        ([5, 3], 6),
        ([5, -3], None),
        (torch.tensor([True, False, False]), 3),
    ],
    ids=str,
)
def test_the_end(given: Any, end: int | None) -> None:
    assert Tokens("visual", given).end == end


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, r"visual must be a slice, a sequence of ints, an int64 tensor .* got int"),
        (None, TypeError, "got NoneType"),
        ("12", TypeError, "got str"),
        ([1.0, 2], TypeError, "got list of float, int"),
        ([True, False], TypeError, "got list of bool"),
        (torch.tensor([1.0]), TypeError, r"got a torch.float32 tensor of shape \(1,\)"),
        (torch.zeros(2, 2, dtype=torch.bool), TypeError, r"got a torch.bool tensor of shape \(2, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, r"got a torch.int64 tensor of shape \(2, 2\)"),
        ([], ValueError, "visual names no token"),
        (torch.zeros(4, dtype=torch.bool), ValueError, "visual names no token"),
        ([1, 2, 1], ValueError, "visual names a token twice"),
    ],
    ids=str,
)
def test_what_cannot_be_meant(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Tokens("visual", given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([3, 9], "visual must index one of the layer's 9 key tokens, got 9"),
        ([-10, 3], "got -10"),
        ([-1, 8], "names one of the layer's 9 key tokens twice"),
        (torch.ones(8, dtype=torch.bool), "visual is a mask over 8 tokens, the layer has 9 key tokens"),
    ],
    ids=str,
)
def test_tokens_that_a_sequence_does_not_have(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokens("visual", given).check(LENGTH, "key")
    host = Host(batch_first=True)
    tap = AttentionTap(list(host.layers), visual=given)
    host(torch.randn(2, LENGTH, 16))  # is the host's own business while nothing is recorded
    for gradients in (True, False):
        tokens = torch.randn(2, LENGTH, 16, requires_grad=gradients)
        with pytest.raises(ValueError, match=message), tap.recording():
            host(tokens)


def test_an_index_is_kept_where_the_layers_are() -> None:
    """Copied there when the tap is made, so that no forward pass waits for it; again after the model has moved."""
    with torch.device("meta"):
        there, x = Host(batch_first=True), torch.randn(2, LENGTH, 16)
    tap = AttentionTap(list(there.layers), query=[5, 2], visual=SCATTERED)
    assert list(tap._visual._indices) == [torch.device("meta")]
    with no_host_sync():
        tap._visual.of(x)
    tap._visual.of(torch.zeros(2, LENGTH, 16))
    assert list(tap._visual._indices) == [torch.device("meta"), torch.device("cpu")]


def test_survives_a_pickle() -> None:
    tokens: Tokens = pickle.loads(pickle.dumps(Tokens("visual", SCATTERED)))
    x: Tensor = torch.randn(2, LENGTH, 4)
    assert torch.equal(tokens.of(x), x[:, SCATTERED])
