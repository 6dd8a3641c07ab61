"""What `QueryAttention` and `attention_terms` refuse: each message names the argument, on every backend alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import BACKENDS
from torch import Tensor

from attbalance_ext import BoxRegion, QueryAttention, attention_map, attention_terms

B, N, D = 2, 12, 4


def query(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape or (B, D), dtype=dtype, device=device)


def key(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape or (B, N, D), dtype=dtype, device=device)


ATTENTIONS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "query is not a tensor": (lambda: QueryAttention([1.0], [key()], 1), TypeError, r"query\[0\].*float"),
    "no query": (lambda: QueryAttention(None, key(), 1), TypeError, "query must be a tensor or a sequence.*NoneType"),
    "no key": (lambda: QueryAttention(query(), None, 1), TypeError, "key must be a tensor or a sequence.*NoneType"),
    "no scale": (lambda: QueryAttention(query(), key(), None), TypeError, "scale must be a number.*None"),
    "scale is text": (lambda: QueryAttention(query(), key(), "1/8"), TypeError, "scale must be a number.*1/8"),
    "scale is NaN": (lambda: QueryAttention(query(), key(), float("nan")), ValueError, "scale.*finite.*nan"),
    "scale beyond float32": (lambda: QueryAttention(query(), key(), [1e39]), ValueError, r"scale.*finite.*1e\+39"),
    "scale is a tensor of two": (lambda: QueryAttention(query(), key(), torch.ones(2)), TypeError, "scale must be"),
    "query of integers": (lambda: QueryAttention(query(dtype=torch.int64), key(), 1), TypeError, r"query\[0\].*int64"),
    "key of bool": (lambda: QueryAttention(query(), key(dtype=torch.bool), 1), TypeError, r"key\[0\].*bool"),
    "key of complex": (lambda: QueryAttention(query(), key(dtype=torch.cfloat), 1), TypeError, r"key\[0\].*complex"),
    "query of rank 3": (
        lambda: QueryAttention(query(B, 1, D), key(), 1),
        ValueError,
        r"query\[0\].*\(B, D\).*\(2, 1, 4\)",
    ),
    "key of rank 2": (lambda: QueryAttention(query(), key(N, D), 1), ValueError, r"key\[0\].*\(B, N, D\).*\(12, 4\)"),
    "other batch": (lambda: QueryAttention(query(3, D), key(), 1), ValueError, r"key\[0\].*\(3, 4\).*\(2, 12, 4\)"),
    "other width": (lambda: QueryAttention(query(B, 5), key(), 1), ValueError, r"key\[0\].*\(2, 5\).*\(2, 12, 4\)"),
    "no tokens": (lambda: QueryAttention(query(), key(B, 0, D), 1), ValueError, r"key\[0\].*token.*\(2, 0, 4\)"),
    "no channels": (lambda: QueryAttention(query(B, 0), key(B, N, 0), 1), ValueError, r"key\[0\].*channel"),
    "layers differ": (
        lambda: QueryAttention([query(), query()], [key(), key(B, N + 1, D)], 1),
        ValueError,
        r"all layers share.*key\[1\].*\(2, 13, 4\)",
    ),
    "a key short": (lambda: QueryAttention([query(), query()], [key()], 1), ValueError, "query and key.*2 and 1"),
    "a scale short": (lambda: QueryAttention([query()] * 3, [key()] * 3, [1, 1]), ValueError, "scale.*3.*2"),
    "devices differ": (
        lambda: QueryAttention(query(), key(device="meta"), 1),
        ValueError,
        r"query and key.*one device.*meta",
    ),
    "padding of floats": (lambda: QueryAttention(query(), key(), 1, torch.zeros(B, N)), TypeError, "padding.*bool"),
    "padding is a list": (lambda: QueryAttention(query(), key(), 1, [False] * N), TypeError, "padding.*list"),
    "padding transposed": (
        lambda: QueryAttention(query(), key(), 1, torch.zeros(N, B, dtype=torch.bool)),
        ValueError,
        r"padding.*\(2, 12\).*\(12, 2\)",
    ),
    "padding elsewhere": (
        lambda: QueryAttention(query(), key(), 1, torch.zeros(B, N, dtype=torch.bool, device="meta")),
        ValueError,
        "padding.*cpu.*meta",
    ),
    "per-head query of rank 2": (
        lambda: QueryAttention.from_heads(query(), key(B, 1, N, D)),
        ValueError,
        r"query\[0\].*\(B, H, d\)",
    ),
    "per-head key of rank 3": (
        lambda: QueryAttention.from_heads(query(B, 1, D), key()),
        ValueError,
        r"key\[0\].*\(B, H, N, d\)",
    ),
    "heads differ": (
        lambda: QueryAttention.from_heads(query(B, 2, D), key(B, 3, N, D)),
        ValueError,
        r"key\[0\].*\(2, 2, 4\).*\(2, 3, 12, 4\)",
    ),
    "no heads": (
        lambda: QueryAttention.from_heads(query(B, 0, D), key(B, 0, N, D)),
        ValueError,
        r"query\[0\].*at least one head.*\(2, 0, 4\)",
    ),
    "heads of no width": (
        lambda: QueryAttention.from_heads(query(B, 2, 0), key(B, 2, N, 0)),
        ValueError,
        r"query\[0\].*one channel.*\(2, 2, 0\)",
    ),
    "per-head integers": (
        lambda: QueryAttention.from_heads(query(B, 2, D, dtype=torch.int32), key(B, 2, N, D)),
        TypeError,
        r"query\[0\].*int32",
    ),
    "more layers than recorded": (lambda: QueryAttention(query(), key(), 1).last(2), ValueError, "n .*1.*2"),
    "fewer than no layers": (lambda: QueryAttention(query(), key(), 1).last(-1), ValueError, "n .*-1"),
    "map of something else": (lambda: attention_map(key()), TypeError, "attention.*Tensor"),
    "map of no layers": (lambda: attention_map(QueryAttention([], [], [])), ValueError, "attention.*no layers"),
    "map with wrong padding": (
        lambda: attention_map(QueryAttention(query(), key(), 1), torch.zeros(B, N)),
        TypeError,
        "key_padding_mask.*bool",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_refuses(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def attention(*shape: int, layers: int = 1, device: str = "cpu") -> QueryAttention:
    batch, tokens, width = shape or (B, N, D)
    return QueryAttention(
        [query(batch, width, device=device)] * layers, [key(batch, tokens, width, device=device)] * layers, 1.0
    )


WEIGHTS = torch.ones(B, N)
BOXES = torch.full((B, 4), 0.5)

CALLS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "student is a tensor": ({"student": key()}, TypeError, "student.*QueryAttention.*Tensor"),
    "region is a list": ({"region": [1.0]}, TypeError, "region.*BoxRegion.*list"),
    "region of integers": ({"region": torch.ones(B, N, dtype=torch.int64)}, TypeError, "region.*int64"),
    "region of rank 3": ({"region": torch.ones(B, 3, 4)}, ValueError, r"region.*\(B, N\).*\(2, 12\).*\(2, 3, 4\)"),
    "region of other tokens": ({"region": torch.ones(B, N + 1)}, ValueError, r"region.*\(2, 12\).*\(2, 13\)"),
    "region of other batch": ({"region": torch.ones(1, N)}, ValueError, r"region.*\(2, 12\).*\(1, 12\)"),
    "region elsewhere": ({"region": WEIGHTS.to("meta")}, ValueError, "region.*cpu.*meta"),
    "boxes elsewhere": ({"region": BoxRegion(BOXES.to("meta"), (3, 4))}, ValueError, "region.*cpu.*meta"),
    "grid gives other N": ({"region": BoxRegion(BOXES, (3, 5))}, ValueError, r"region.*\(2, 12\).*N = 15"),
    "grids give other N": ({"region": BoxRegion(BOXES, ((3, 4), (1, 1)))}, ValueError, "region.*N = 13"),
    "boxes of other batch": ({"region": BoxRegion(BOXES[:1], (3, 4))}, ValueError, "region.*1 boxes"),
    "teacher is a tensor": ({"teacher": key()}, TypeError, "teacher.*QueryAttention.*Tensor"),
    "teacher of other layers": ({"teacher": attention(layers=2)}, ValueError, "teacher.*1 layers.*2"),
    "teacher of other shape": ({"teacher": attention(B, N, 5)}, ValueError, r"teacher.*\(2, 12, 4\).*\(2, 12, 5\)"),
    "teacher elsewhere": ({"teacher": attention(device="meta")}, ValueError, "teacher.*cpu.*meta"),
    "mask of floats": ({"key_padding_mask": torch.zeros(B, N)}, TypeError, "key_padding_mask.*bool"),
    "mask of other shape": (
        {"key_padding_mask": torch.zeros(B, 1, dtype=torch.bool)},
        ValueError,
        r"key_padding_mask.*\(2, 12\).*\(2, 1\)",
    ),
}


@pytest.mark.parametrize(("wrong", "error", "message"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_refuse(backend: str, wrong: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"student": attention(), "region": WEIGHTS} | wrong
    with pytest.raises(error, match=message):
        attention_terms(backend=backend, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_calls_are_right_but_for_what_they_test(backend: str) -> None:
    terms = attention_terms(
        attention(),
        WEIGHTS,
        teacher=attention(),
        key_padding_mask=torch.zeros(B, N, dtype=torch.bool),
        backend=backend,
    )
    assert terms.in_box.tolist() == [[1.0, 1.0]]


def test_last_keeps_the_last_layers() -> None:
    attention = QueryAttention([query() + i for i in range(6)], [key() + i for i in range(6)], range(6))
    last = attention.last(4)
    assert [k[0, 0, 0].item() for k in last.key] == [2, 3, 4, 5]
    assert [q[0, 0].item() for q in last.query] == [2, 3, 4, 5]
    assert last.scale == (2, 3, 4, 5)
    assert attention.last(0).key == ()
    assert len(attention.last(6).key) == 6


def test_numpy_numbers_are_scales() -> None:
    assert QueryAttention([query()] * 2, [key()] * 2, np.float32(0.5)).scale == (0.5, 0.5)
    assert QueryAttention([query()] * 2, [key()] * 2, [np.float32(0.5), 1]).scale == (0.5, 1.0)


def test_from_heads_scale() -> None:
    attention = QueryAttention.from_heads(query(B, 8, 32), key(B, 8, N, 32))
    assert attention.scale == pytest.approx((1 / (8 * 32**0.5),))
    assert attention.key[0].shape == (B, N, 256)
    assert QueryAttention.from_heads(query(B, 8, 32), key(B, 8, N, 32), scaling=0.5).scale == (0.0625,)


def test_from_heads_reads_token_major_storage_in_place() -> None:
    storage = torch.randn(B, N, 8, 32)
    attention = QueryAttention.from_heads(query(B, 8, 32), storage.transpose(1, 2))
    assert attention.key[0].data_ptr() == storage.data_ptr()
