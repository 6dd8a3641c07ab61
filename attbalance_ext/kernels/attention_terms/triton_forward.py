"""Forward kernels of `attention_terms`: `attend` reads the keys, `finish` merges what its programs found.

A program reads some tokens of one row (a layer and sample) once, several at a time. Each of its slots keeps an online
softmax of the tokens it saw, inside the region, outside, and of the teacher, and their weighted sums of keys. Slots are
merged when all tokens are read, programs by `finish`, both in a fixed order.

Scores are float64, and what is done once a token is done in it: near 50 the last digit of a float32 is worth more than
the KL divergence of a teacher that almost agrees. What is done D times a token is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attbalance_ext.kernels.attention_terms.triton_pieces import (
    clamped,
    exp_remainder,
    live_tokens,
    load_query,
    of_layer,
    region_weight,
)

_INF = tl.constexpr(float("inf"))

# What one program found in its tokens. A largest score and the sum relative to it: inside the region (weights m),
# outside (1 - m), of the teacher (1). Then a number that is 0 where no token has weight, NaN where a weight is.
_IN, _OUT, _TEACHER, _REGION, PARTS = (tl.constexpr(place) for place in (0, 2, 4, 6, 7))


@triton.jit
def _load_keys(keys, token, token_stride, live, column, dim: tl.constexpr):
    """(tokens, groups, group) in float32; 0 where not `live`."""
    place = token.to(tl.int64)[:, None, None] * token_stride + column[None, :, :]
    return tl.load(keys + place, mask=live[:, None, None] & (column < dim)[None, :, :], other=0.0).to(tl.float32)


@triton.jit
def _columns(first, block: tl.constexpr, group: tl.constexpr):
    """`block` columns from `first`, as (groups, group)."""
    return first + tl.arange(0, block // group)[:, None] * group + tl.arange(0, group)[None, :]


@triton.jit
def _dot(query, key):
    """q . k of each token in float64; groups of neighbours in float32."""
    return tl.sum(tl.sum(query[None, :, :] * key, 2).to(tl.float64), 1)


@triton.jit
def _scores(
    query,
    keys,
    key,
    b,
    token,
    token_stride,
    live,
    scale,
    rest,
    dim: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
):
    """scale * q . k of each token in float64, NaN where it is not finite. key: the first `block` columns."""
    score = _dot(load_query(query, b, _columns(0, block, group), dim), key)
    for first in range(block, dim, block):
        column = _columns(first, block, group)
        further = _load_keys(keys, token, token_stride, live, column, dim)
        score += _dot(load_query(query, b, column, dim), further)
    score *= scale.to(tl.float64) + rest.to(tl.float64)
    near = score.to(tl.float32)
    # The largest score is kept as float32: from where half of its last digit is worth more than 1, exp would overflow.
    score = tl.where(tl.abs(near) < 1e6, score, near.to(tl.float64))
    return tl.where(tl.abs(near) < _INF, score, float("nan"))


@triton.jit
def _absorb(score, weight, key, largest, total, key_sum, with_keys: tl.constexpr):
    """One more token for each slot: the largest score, the sum of w exp(s - largest), and of that times the key."""
    counted = weight > 0
    top = tl.where(counted & (score.to(tl.float32) > largest), score.to(tl.float32), largest)
    correction = tl.where(top > largest, tl.exp(largest - top), 1.0)
    share = tl.where(counted, weight * tl.exp((score - top).to(tl.float32)), 0.0)
    total = total * correction + share
    if with_keys:
        key_sum = tl.fma(share[:, None, None], key, key_sum * correction[:, None, None])
    return top, total, key_sum


@triton.jit
def _merged(largest, total):
    """The slots' or parts' largest score, and the factor of each to be relative to it: 0 for one without tokens."""
    top = tl.max(largest, 0)
    return top, tl.where(total != 0, tl.exp(largest - top), 0.0)


@triton.jit
def _store_slots(part, sums, column, largest, total, key_sum, first, dim: tl.constexpr, with_keys: tl.constexpr):
    """Merge the slots of a program. first: whether this program writes what programs of all chunks know."""
    top, factor = _merged(largest, total)
    if first:
        tl.store(part, top)
        tl.store(part + 1, tl.sum(total * factor, 0))
    if with_keys:
        tl.store(sums + column, tl.sum(key_sum * factor[:, None, None], 0), mask=column < dim)


@triton.jit(do_not_specialize=["first_layer", "batch", "tokens", "splits", "split_tokens"])
def attend(
    query,  # layers of this launch x (B, D) float32
    key,  # layers x (B, N, D)
    scale,  # layers x number
    scale_rest,  # what rounding `scale` to float32 left
    key_batch_stride,
    key_token_stride,
    teacher_query,  # the same of the teacher, or None
    teacher_key,
    teacher_scale,
    teacher_scale_rest,
    teacher_batch_stride,
    teacher_token_stride,
    region,  # boxes (B, 4), or weights (B, N)
    padding,  # (B, N) or None
    scores,  # (L, B, N) float64
    teacher_scores,  # (L, B, N) float64 or None
    parts,  # (L, B, splits, PARTS)
    key_sums,  # (L, B, splits, 3, D) or None
    first_layer,
    batch,
    tokens,
    splits,
    split_tokens,
    grids: tl.constexpr,
    rule: tl.constexpr,
    dim: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
    group: tl.constexpr,
):
    """Scores, softmax sums and key sums of one split of one row. Grid: (rows of this launch * splits, chunks).

    Columns are (block_dim / group, group) throughout, where a group is what a 128-bit load reads: reshaped halfway,
    keys and their sums would be in registers in two layouts.
    """
    with_keys: tl.constexpr = key_sums is not None
    with_teacher: tl.constexpr = teacher_key is not None
    split, row = tl.program_id(0) % splits, tl.program_id(0) // splits
    layer, b = row // batch, row % batch
    row = (first_layer * batch + row).to(tl.int64)
    chunk = tl.program_id(1)
    first_columns, column = _columns(0, block_dim, group), _columns(chunk * block_dim, block_dim, group)

    q, keys = of_layer(query, layer), of_layer(key, layer) + b.to(tl.int64) * key_batch_stride
    factor, rest = of_layer(scale, layer), of_layer(scale_rest, layer)
    if with_teacher:
        teacher_q = of_layer(teacher_query, layer)
        teacher_keys = of_layer(teacher_key, layer) + b.to(tl.int64) * teacher_batch_stride
        teacher_factor, teacher_rest = of_layer(teacher_scale, layer), of_layer(teacher_scale_rest, layer)

    in_top = tl.full([block_tokens], -_INF, tl.float32)
    out_top, teacher_top = in_top, in_top
    in_sum = tl.zeros([block_tokens], tl.float32)
    out_sum, teacher_sum, largest_weight = in_sum, in_sum, in_sum
    in_keys = tl.zeros([block_tokens, block_dim // group, group], tl.float32)
    out_keys, teacher_keys_sum = in_keys, in_keys
    end = tl.minimum((split + 1) * split_tokens, tokens)
    for base in range(split * split_tokens, end, block_tokens):
        token = base + tl.arange(0, block_tokens)
        live = live_tokens(padding, b, token, end, tokens)
        # Both are read before either is used, so that they are on their way together.
        k = _load_keys(keys, token, key_token_stride, live, first_columns, dim)
        if with_teacher:
            teacher_k = _load_keys(teacher_keys, token, teacher_token_stride, live, first_columns, dim)
        m = region_weight(region, b, token, tokens, live, grids, rule)
        largest_weight = tl.where((m > largest_weight) | (m != m), m, largest_weight)
        m = clamped(m)
        if with_teacher:
            teacher_score = _scores(
                teacher_q,
                teacher_keys,
                teacher_k,
                b,
                token,
                teacher_token_stride,
                live,
                teacher_factor,
                teacher_rest,
                dim,
                block_dim,
                group,
            )
        score = _scores(q, keys, k, b, token, key_token_stride, live, factor, rest, dim, block_dim, group)
        if with_keys and dim > block_dim:
            k = _load_keys(keys, token, key_token_stride, live, column, dim)
        if chunk == 0:
            tl.store(scores + row * tokens + token, score, mask=live)
        in_top, in_sum, in_keys = _absorb(score, m, k, in_top, in_sum, in_keys, with_keys)
        out = tl.where(live, 1 - m, 0.0)
        out_top, out_sum, out_keys = _absorb(score, out, k, out_top, out_sum, out_keys, with_keys)
        if with_teacher:
            if chunk == 0:
                tl.store(teacher_scores + row * tokens + token, teacher_score, mask=live)
            teacher_top, teacher_sum, teacher_keys_sum = _absorb(
                teacher_score, live.to(tl.float32), k, teacher_top, teacher_sum, teacher_keys_sum, with_keys
            )

    part = parts + (row * splits + split) * PARTS
    sums = part  # not used without key sums
    if with_keys:
        sums = key_sums + (row * splits + split) * (3 * dim)
    first = chunk == 0
    _store_slots(part + _IN, sums, column, in_top, in_sum, in_keys, first, dim, with_keys)
    _store_slots(part + _OUT, sums + dim, column, out_top, out_sum, out_keys, first, dim, with_keys)
    if with_teacher:
        _store_slots(
            part + _TEACHER, sums + 2 * dim, column, teacher_top, teacher_sum, teacher_keys_sum, first, dim, with_keys
        )
    if first:
        # A sum, for tl.max need not return NaN.
        tl.store(part + _REGION, tl.sum(largest_weight, 0))


@triton.jit
def _load_parts(parts, kind: tl.constexpr, place, there):
    """One kind of sum over the splits: the largest score, and the factor and sum of each part relative to it."""
    largest = tl.load(parts + place * PARTS + kind, mask=there, other=-_INF).to(tl.float64)
    total = tl.load(parts + place * PARTS + (kind + 1), mask=there, other=0.0).to(tl.float64)
    top, factor = _merged(largest, total)
    return top, factor, tl.sum(total * factor, 0)


@triton.jit
def _log1m(x):
    """log(1 - x) in float64, exact where x is small too (Goldberg 1991, theorem 4)."""
    rest = 1 - x
    return tl.where(rest == 1, -x, tl.log(rest) * (x / (1 - rest)))


@triton.jit
def _mean(key_sums, place, there, kind: tl.constexpr, factor, column, dim: tl.constexpr):
    """Sum over the splits, in order, of one kind of key sums; `factor` (splits,)."""
    sums = tl.load(
        key_sums + (place * 3 + kind)[:, None] * dim + column[None, :],
        mask=there[:, None] & (column < dim)[None, :],
        other=0.0,
    )
    return tl.sum(sums * factor.to(tl.float32)[:, None], 0)


@triton.jit(do_not_specialize=["batch", "tokens", "splits"])
def finish(
    padding,  # (B, N) or None
    scores,  # (L, B, N) float64
    teacher_scores,  # (L, B, N) float64 or None
    parts,  # (L, B, splits, PARTS)
    key_sums,  # (L, B, splits, 3, D) or None
    in_box,  # (L, B)
    rac,  # (L, B)
    mrc,  # (L, B)
    valid,  # (B,)
    log_p,  # (L, B, N)
    log_t,  # (L, B, N) or None
    stats,  # (L, B, 4): lse, log A_in, A_out, the teacher's lse
    key_means,  # (L, B, 3, D): kbar_in, kbar_out, kbar_t; or None
    batch,
    tokens,
    splits,
    dim: tl.constexpr,
    block_splits: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Terms of a row, and what its backward pass needs. Grid: (rows,)."""
    with_teacher: tl.constexpr = teacher_scores is not None
    row = tl.program_id(0).to(tl.int64)
    b = (row % batch).to(tl.int32)
    split = tl.arange(0, block_splits)
    place, there = row * splits + split, split < splits
    in_top, in_factor, in_sum = _load_parts(parts, _IN, place, there)
    out_top, out_factor, out_sum = _load_parts(parts, _OUT, place, there)
    region = tl.sum(tl.load(parts + place * PARTS + _REGION, mask=there, other=0.0), 0)
    top = tl.maximum(in_top, out_top)
    in_share = tl.where(in_sum != 0, tl.exp(in_top - top), 0.0)  # to be relative to the row's largest score
    out_share = tl.where(out_sum != 0, tl.exp(out_top - top), 0.0)
    total = in_sum * in_share + out_sum * out_share
    any_token = total != 0
    lse = tl.where(any_token, top + tl.log(total), 0.0)
    teacher_lse = lse * 0
    if with_teacher:
        teacher_top, teacher_factor, teacher_sum = _load_parts(parts, _TEACHER, place, there)
        teacher_lse = tl.where(any_token, teacher_top + tl.log(teacher_sum), 0.0)

    # KL(t || p) = sum_j t_j (e^x_j - 1 - x_j), x = log p - log t.
    divergence = tl.zeros([block_tokens], tl.float32)
    for base in range(0, tokens, block_tokens):
        token = base + tl.arange(0, block_tokens)
        live = live_tokens(padding, b, token, tokens, tokens)
        here = row * tokens + token
        logp = tl.where(live, tl.load(scores + here, mask=live, other=0.0) - lse, 0.0)
        tl.store(log_p + here, logp.to(tl.float32), mask=token < tokens)
        if with_teacher:
            logt = tl.where(live, tl.load(teacher_scores + here, mask=live, other=0.0) - teacher_lse, 0.0)
            tl.store(log_t + here, logt.to(tl.float32), mask=token < tokens)
            x, t = (logp - logt).to(tl.float32), tl.exp(logt.to(tl.float32))
            far = tl.exp(logp.to(tl.float32)) - t - t * x
            divergence += tl.where(live, tl.where(tl.abs(x) < 1, t * x * x * exp_remainder(x), far), 0.0)

    out_of_box = tl.where(any_token, out_sum * out_share / total, 0.0)
    a_in = in_sum * in_share / total
    log_in = tl.where(a_in > 0.5, _log1m(out_of_box), in_top + tl.log(in_sum) - lse)
    # No token has weight: A_in = 0 whatever the scores are. A weight is NaN: NaN.
    in_region = (region != 0) & any_token
    undefined = region != region
    log_in = tl.where(undefined, float("nan"), tl.where(in_region, log_in, -_INF))
    tl.store(in_box + row, tl.where(undefined, float("nan"), tl.where(in_region, a_in, 0.0)).to(tl.float32))
    tl.store(rac + row, tl.where(log_in == -_INF, 0.0, 0 - 2 * log_in).to(tl.float32))
    tl.store(mrc + row, tl.where(any_token, tl.sum(divergence, 0), 0.0))
    if row < batch:
        tl.store(valid + b, region != 0)
    stat = stats + row * 4
    tl.store(stat, lse.to(tl.float32))
    tl.store(stat + 1, log_in.to(tl.float32))
    tl.store(stat + 2, tl.where(undefined, float("nan"), out_of_box).to(tl.float32))
    tl.store(stat + 3, teacher_lse.to(tl.float32))

    if key_means is not None:
        for first in range(0, dim, block_dim):
            column = first + tl.arange(0, block_dim)
            means = key_means + row * (3 * dim) + column
            # Twice by the root: 1 / sum overflows float32 where all weights of a region are subnormal.
            root = tl.where(in_sum != 0, 1 / tl.sqrt(in_sum), 0.0)
            mean_in = _mean(key_sums, place, there, 0, in_factor * root, column, dim) * root.to(tl.float32)
            mean_out = _mean(
                key_sums, place, there, 1, tl.where(any_token, out_factor * out_share / total, 0.0), column, dim
            )
            mean_teacher = mean_in * 0
            if with_teacher:
                teacher_weight = tl.where(any_token, teacher_factor / teacher_sum, 0.0)
                mean_teacher = _mean(key_sums, place, there, 2, teacher_weight, column, dim)
            tl.store(means, mean_in, mask=column < dim)
            tl.store(means + dim, mean_out, mask=column < dim)
            tl.store(means + 2 * dim, mean_teacher, mask=column < dim)
