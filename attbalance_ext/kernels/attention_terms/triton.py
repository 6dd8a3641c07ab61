"""`attention_terms` in Triton: how a call is cut into programs, and its launches; all layers in one."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from attbalance_ext.kernels.attention_terms.triton_backward import backward
from attbalance_ext.kernels.attention_terms.triton_forward import PARTS, attend, finish
from attbalance_ext.kernels.dtypes import DTYPES

MAX_LAYERS = 16  # of one launch
_WARPS = 4
# No multiplication and addition is contracted: the bits of region weights are the reference's.
_OPTIONS: dict[str, object] = {"num_warps": _WARPS, "enable_fp_fusion": False}
if torch.version.hip is None:
    # Three programs of 128 threads share the 65536 registers of a multiprocessor. Left to choose, ptxas spills a few
    # registers to fit one program more.
    _OPTIONS["maxnreg"] = 168


class ForwardPlan(NamedTuple):
    """splits: programs that share a row (a layer and sample); merged_splits: the power of two that holds them.

    split_tokens: of each split; the last may have fewer. block_tokens x block_dim: what a program of `attend` reads at
    a time. chunks: programs that share the key sums of a split; each of them works out all its scores. merged_dim:
    columns of the key sums that `finish` merges at a time.
    """

    splits: int
    split_tokens: int
    block_tokens: int
    block_dim: int
    chunks: int
    merged_splits: int
    merged_dim: int


@functools.lru_cache(maxsize=256)
def forward_plan(rows: int, tokens: int, dim: int, multiprocessors: int, vector: int) -> ForwardPlan:
    """As many programs as fill the device, but none with less than four blocks of tokens.

    vector: columns that one load reads. A block is two loads of each thread, or two tokens where that is more: every
    thread that holds a part of a token keeps all of its softmax, so few columns of many tokens would not fit into its
    registers. With several chunks it is one load, for the chunk is read beside the blocks of the scores.
    """
    block_dim = min(max(triton.next_power_of_2(dim), 32), 1024 if dim <= 1024 else 512)
    loads = 2 if dim <= block_dim else 1
    block_tokens = max(loads * 32 * _WARPS * vector // block_dim, 2)
    splits = max(min(4 * multiprocessors // max(rows, 1), tokens // (4 * block_tokens), 16), 1)
    return ForwardPlan(
        splits=splits,
        split_tokens=triton.cdiv(tokens, splits),
        block_tokens=block_tokens,
        block_dim=block_dim,
        chunks=triton.cdiv(dim, block_dim),
        merged_splits=triton.next_power_of_2(splits),
        merged_dim=min(block_dim, 128),
    )


@functools.lru_cache(maxsize=256)
def backward_blocks(rows: int, tokens: int, dim: int, multiprocessors: int) -> tuple[int, int]:
    """(tokens, columns) that a program of the backward pass writes at a time; it writes all columns of its tokens.

    Where stores cannot be wide, which takes rows of a multiple of 16 columns, fewer: a thread would hold many tokens.
    """
    block_dim = min(max(triton.next_power_of_2(dim), 16), 128)
    block_tokens = min((2048 if dim % 16 == 0 else 512) // block_dim, 64)
    while block_tokens > 16 and rows * -(-tokens // block_tokens) < 4 * multiprocessors:
        block_tokens //= 2
    return block_tokens, block_dim


def _vector(keys: Sequence[Tensor], dim: int) -> int:
    """Columns that one load reads: 128 bits, where Triton sees the alignment, which it does in multiples of 16 only."""
    if any(k.data_ptr() % 16 for k in keys):
        return 1
    return min(_aligned(stride, dim, dtype) for stride, dtype in {(k.stride(), k.dtype) for k in keys})


@functools.lru_cache(maxsize=256)
def _aligned(stride: tuple[int, ...], dim: int, dtype: torch.dtype) -> int:
    return 1 if stride[0] % 16 or stride[1] % 16 else math.gcd(dim, 16 // dtype.itemsize)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter runs one program after another: enough to share a row's tokens between several.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.lru_cache(maxsize=256)
def _with_rest(numbers: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The numbers in float32, which is what a kernel takes, and what is left of them."""
    rounded = tuple(ctypes.c_float(number).value for number in numbers)
    return rounded, tuple(number - near for number, near in zip(numbers, rounded, strict=True))


@functools.lru_cache(maxsize=256)
def _grid_places(grids: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """(first token, rows, columns) of each grid."""
    places, first = [], 0
    for rows, columns in zip(grids[::2], grids[1::2], strict=True):
        places.append((first, rows, columns))
        first += rows * columns
    return tuple(places)


def _runs(kinds: Sequence[Hashable]) -> list[slice]:
    """Consecutive layers of one kind, at most MAX_LAYERS together: what one launch takes."""
    runs, first = [], 0
    for last in range(1, len(kinds) + 1):
        if last == len(kinds) or kinds[last] != kinds[first] or last - first == MAX_LAYERS:
            runs.append(slice(first, last))
            first = last
    return runs


def attention_terms(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    scale: Sequence[float],
    region: Tensor,
    grids: Sequence[int],
    rule: int,
    padding: Tensor | None,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Sequence[float],
    need_key_means: bool,
) -> tuple[Tensor, ...]:
    """The op `attention_terms.triton`, see ``ops.py``."""
    layers, (batch, tokens, dim) = len(key), key[0].shape
    rows, with_teacher = layers * batch, bool(teacher_key)
    vector = _vector((*key, *teacher_key), dim)
    plan = forward_plan(rows, tokens, dim, _multiprocessors(key[0].device), vector)

    def floats(*shape: int) -> Tensor:
        return query[0].new_empty(shape)

    def doubles(*shape: int) -> Tensor:
        return query[0].new_empty(shape, dtype=torch.float64)

    in_box, rac, mrc = floats(layers, batch), floats(layers, batch), floats(layers, batch)
    valid = query[0].new_empty(batch, dtype=torch.bool)
    log_p, scores = floats(layers, batch, tokens), doubles(layers, batch, tokens)
    log_t, teacher_scores = (torch.empty_like(log_p), torch.empty_like(scores)) if with_teacher else (floats(0), None)
    stats, parts = floats(layers, batch, 4), floats(layers, batch, plan.splits, PARTS.value)
    key_means = floats(layers, batch, 3, dim) if need_key_means else floats(0)
    key_sums = floats(layers, batch, plan.splits, 3, dim) if need_key_means else None

    kinds: list[Hashable] = [(k.dtype, k.stride()) for k in key]
    if with_teacher:
        kinds = [(kind, k.dtype, k.stride()) for kind, k in zip(kinds, teacher_key, strict=True)]
    factor, rest = _with_rest(tuple(scale))
    teacher_factor, teacher_rest = _with_rest(tuple(teacher_scale))
    with torch.cuda.device_of(key[0]):
        for run in _runs(kinds):
            teacher: tuple[object, ...] = (None, None, None, None, 0, 0)
            key_size = key[run.start].element_size()
            if with_teacher:
                key_size = max(key_size, teacher_key[run.start].element_size())
                teacher = _layers_of(run, teacher_query, teacher_key, teacher_factor, teacher_rest)
            attend[((run.stop - run.start) * batch * plan.splits, plan.chunks)](
                *_layers_of(run, query, key, factor, rest),
                *teacher,
                region,
                padding,
                scores,
                teacher_scores,
                parts,
                key_sums,
                run.start,
                batch,
                tokens,
                plan.splits,
                plan.split_tokens,
                grids=_grid_places(tuple(grids)),
                rule=rule,
                dim=dim,
                block_tokens=plan.block_tokens,
                block_dim=plan.block_dim,
                group=16 // key_size,
                **_OPTIONS,
            )
        finish[(rows,)](
            padding,
            scores,
            teacher_scores,
            parts,
            key_sums,
            in_box,
            rac,
            mrc,
            valid,
            log_p,
            log_t if with_teacher else None,
            stats,
            key_means if need_key_means else None,
            batch,
            tokens,
            plan.splits,
            dim=dim,
            block_splits=plan.merged_splits,
            block_tokens=256,
            block_dim=plan.merged_dim,
            **_OPTIONS,
        )
    return in_box, rac, mrc, valid, log_p, log_t, stats, key_means


def _layers_of(
    run: slice, query: Sequence[Tensor], key: Sequence[Tensor], scale: Sequence[float], rest: Sequence[float]
) -> tuple[object, ...]:
    """The arguments of `attend` that describe keys; their strides are those of every layer in the run."""
    batch_stride, token_stride, _ = key[run.start].stride()
    return tuple(query[run]), tuple(key[run]), scale[run], rest[run], batch_stride, token_stride


def attention_terms_backward(
    grad_in_box: Tensor,
    grad_rac: Tensor,
    grad_mrc: Tensor,
    query: Sequence[Tensor],
    scale: Sequence[float],
    region: Tensor,
    grids: Sequence[int],
    rule: int,
    padding: Tensor | None,
    in_box: Tensor,
    log_p: Tensor,
    log_t: Tensor,
    stats: Tensor,
    key_means: Tensor,
    key_dtype: Sequence[int],
    sequence_first: Sequence[bool],
    need_query: Sequence[bool],
    need_key: Sequence[bool],
    need_dot: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The op `attention_terms_backward.triton`, see ``ops.py``."""
    layers, batch, tokens = log_p.shape
    dim = query[0].shape[1]
    grad_query = [torch.empty_like(q) if needed else None for q, needed in zip(query, need_query, strict=True)]
    grad_key = [
        _empty_key(query[0], (batch, tokens, dim), DTYPES[code], tokens_first) if needed else None
        for code, tokens_first, needed in zip(key_dtype, sequence_first, need_key, strict=True)
    ]
    grad_dot = torch.empty_like(log_p) if need_dot else log_p.new_empty(0)
    block_tokens, block_dim = backward_blocks(layers * batch, tokens, dim, _multiprocessors(log_p.device))
    with torch.cuda.device_of(log_p):
        for run in _runs(list(zip(key_dtype, sequence_first, need_query, need_key, strict=True))):
            queries, keys = need_query[run.start], need_key[run.start]
            if not (queries or keys or need_dot):
                continue
            strides = grad_key[run.start].stride() if keys else (0, 0)
            backward[((run.stop - run.start) * batch, -(-tokens // block_tokens) if keys or need_dot else 1)](
                tuple(query[run]),
                tuple(scale[run]),
                tuple(grad_query[run]) if queries else None,
                tuple(grad_key[run]) if keys else None,
                grad_dot if need_dot else None,
                strides[0],
                strides[1],
                region,
                padding,
                grad_in_box,
                grad_rac,
                grad_mrc,
                in_box,
                log_p,
                log_t if log_t.dim() == 3 else None,
                stats,
                key_means if queries else None,
                run.start,
                batch,
                tokens,
                grids=_grid_places(tuple(grids)),
                rule=rule,
                dim=dim,
                block_tokens=block_tokens,
                block_dim=block_dim,
                **_OPTIONS,
            )
    return [g for g in grad_query if g is not None], [g for g in grad_key if g is not None], grad_dot


def _empty_key(like: Tensor, shape: tuple[int, int, int], dtype: torch.dtype, sequence_first: bool) -> Tensor:
    batch, tokens, dim = shape
    if sequence_first:
        return like.new_empty((tokens, batch, dim), dtype=dtype).transpose(0, 1)
    return like.new_empty(shape, dtype=dtype)
