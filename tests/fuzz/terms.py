"""Cases of `attention_terms`: its terms and gradients on each backend against the equations in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from helpers import excess, same_bits
from helpers_attention import Problem
from torch import Tensor

from attbalance_ext import AttentionTerms, BoxRegion, QueryAttention, attention_terms
from attbalance_ext.attention import with_offset
from tests.emulation import emulated_cuda
from tests.fuzz.space import Case, Space
from tests.fuzz.tensors import DTYPES, KEY_LAYOUTS, PLAIN_LAYOUTS, Source, lay_out, lay_out_key
from tests.fuzz.terms_truth import TERMS, Truth, truth_of

RULES = ("touch", "center", "coverage", "nearest")

SPACE = Space(
    {
        "layers": (1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 5, 17),  # one launch holds 16
        "batch": (1, 1, 2, 2, 3, 5, 8, 0),
        "tokens": (*range(1, 41), 63, 64, 65, 100, 128, 129, 150, 300, 401),
        "width": (*range(1, 21), 32, 33, 64, 70, 128, 255, 256, 512, 1030),
        "query_dtype": ("float32", "float32", "bfloat16", "float16", "float64"),
        "key_dtype": ("float32", "float32", "bfloat16", "float16", "float64"),
        "odd_layers": ("alike", "alike", "swapped"),  # query and key exchange dtypes
        "teacher_dtype": (None, None, "float32", "float32", "bfloat16", "float16", "float64"),
        "query_layout": PLAIN_LAYOUTS,
        "key_layout": KEY_LAYOUTS,
        "teacher_layout": KEY_LAYOUTS,
        "shift": (0, 0, 0, 1, 2, 3, 4, 8),
        "shared_key": (False, False, False, True),  # by all layers, as a decoder's memory is
        "region": (*RULES, "weights", "bool"),
        "grids": ("row", "column", "block", "two", "many"),
        "boxes": ("inside", "mixed", "mixed", "cells", "inverted", "outside", "huge", "nan"),
        "box_dtype": ("float32", "float32", "float64", "bfloat16", "float16"),
        "weights": ("fractions", "binary", "wild", "empty", "full", "nan"),
        "region_layout": PLAIN_LAYOUTS,
        "padding": ("none", "none", "some", "some", "lone", "one_sample", "all"),
        "padding_layout": PLAIN_LAYOUTS,
        "padding_argument": ("padding", "key_padding_mask"),
        "scale": (1.0, 0.1, 0.01, 1e-3, 1e-4, 10.0, 100.0, 1e3, 1e4, -1.0, 0.0),
        "spread": (1.0, 1.0, 0.1, 0.01, 1e-4, 8.0, 8.0, 30.0, 100.0, 1e3, 1e4),  # of the scores
        "key_size": (1.0, 1.0, 30.0, 1e3, 1e-3),
        "distance": (1.0, 0.1, 1e-3, 1e-6, 0.0, 10.0),  # of the teacher's keys from the student's
        "poison": (*[None] * 12, "key", "query", "teacher_key", "teacher_query"),
        "poison_value": ("nan", "inf", "-inf"),
        "used": ("all", "all", "all", "in_box", "rac", "mrc", "rac mrc"),  # terms that the loss is made of
        "incoming": ("random", "random", "ones", "transposed", "zeros", "large", "small"),
        "need": ("all", "all", "all", "query", "key", "odd", "one_key"),
        "offset": ("none", "none", "none", "all", "odd"),
        "twice": (False, False, False, True),
        "multiprocessors": (132, 1, 4),
        "order": ("forward", "shuffled"),
        "seed": range(2**31),
    }
)


SIZES = ("layers", "batch", "tokens", "width")
IN_DOUBLE = ("query_dtype", "key_dtype")  # where one is float64, so is the arithmetic


def cost(case: Case, row: int) -> int:
    return case["layers"] * case["batch"] * max(case["tokens"] * max(case["width"], 8), row)


def in_double(case: Case) -> bool:
    return "float64" in (case["query_dtype"], case["key_dtype"])


# --- from a case to tensors ------------------------------------------------------------------------------------------


def grids_of(case: Case) -> tuple[tuple[int, int], ...]:
    tokens, kind = case["tokens"], case["grids"]
    if kind == "column":
        return ((tokens, 1),)
    if kind == "block":
        return (_block(tokens),)
    if kind == "two" and tokens > 1:
        return (_block(tokens // 2), _block(tokens - tokens // 2))
    if kind == "many" and tokens > 17:  # a launch holds 16
        return (*(((1, 1),) * 17), (1, tokens - 17))
    return ((1, tokens),)


def _block(tokens: int) -> tuple[int, int]:
    height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return height, tokens // height


def boxes_of(case: Case, source: Source) -> Tensor:
    kind, batch = case["boxes"], case["batch"]
    size = source.uniform(batch, 2) * 0.8
    inside = torch.cat([size / 2 + source.uniform(batch, 2) * (1 - size), size], dim=1)
    cells = torch.cat([(source.uniform(batch, 2) * 16).round() / 16, (source.uniform(batch, 2) * 16).round() / 16], 1)
    flip = torch.tensor([[1, 1, -1, 1], [1, 1, 1, -1], [1, 1, -1, -1]])[source.index(3)]
    away = torch.tensor([[1.5, 0, 0, 0], [0, -1.5, 0, 0], [-3, 3, 0, 0]])[source.index(3)]
    huge = source.pick([[0.5, 0.5, 1e6, 1e6], [1e30, 0.5, 1e30, 1], [0.5, 0.5, 3e38, 1], [-1e4, 9, 2e4, 2e4]], batch)
    nan, inf = math.nan, math.inf
    wrong = source.pick([[nan, 0.5, 0.5, 0.5], [0.5, 0.5, nan, 0.5], [inf, 0.5, 0.5, 0.5], [0.5, 0.5, inf, 1]], batch)
    kinds = {
        "inside": inside,
        "cells": cells,
        "inverted": inside * flip,
        "outside": inside + away,
        "huge": huge,
        "nan": wrong,
    }
    if kind != "mixed":
        return kinds[kind]
    choices = list(kinds.values())
    return torch.stack([choices[source.index(len(choices))][b] for b in range(batch)]) if batch else inside


def weights_of(case: Case, source: Source) -> Tensor:
    shape = (case["batch"], case["tokens"])
    weights = source.uniform(*shape)
    kind = case["weights"]
    if kind == "binary":
        return (weights < 0.4).double()
    if kind == "wild":
        wild = 4 * weights - 1.5
        return torch.where(source.uniform(*shape) < 0.1, torch.inf * wild.sign(), wild)
    if kind == "empty":
        return torch.zeros(shape, dtype=torch.float64)
    if kind == "full":
        return torch.ones(shape, dtype=torch.float64)
    if kind == "nan" and case["batch"]:
        weights[source.index(shape[0]), source.index(shape[1])] = torch.nan
    return weights


def region_of(case: Case, source: Source) -> BoxRegion | Tensor:
    kind, dtype, layout = case["region"], DTYPES[case["box_dtype"]], case["region_layout"]
    if kind in RULES:
        return BoxRegion(lay_out(boxes_of(case, source).to(dtype), layout), grids_of(case), kind)
    weights = weights_of(case, source)
    return lay_out(weights > 0.5 if kind == "bool" else weights.to(dtype), layout)


def padding_of(case: Case, source: Source) -> Tensor | None:
    kind, shape = case["padding"], (case["batch"], case["tokens"])
    if kind == "none":
        return None
    padding = source.uniform(*shape) < 0.3
    padding[:, source.index(shape[1])] = False
    if kind == "lone":
        padding = source.uniform(*shape) < 2
        padding[:, source.index(shape[1])] = False
    elif kind == "all":
        padding[:] = True
    elif kind == "one_sample" and shape[0]:
        padding[source.index(shape[0])] = True
    return lay_out(padding, case["padding_layout"])


def attention_of(
    query: Sequence[Tensor],
    key: Sequence[Tensor],
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
    case: Case,
    layout: str,
) -> tuple[list[Tensor], list[Tensor]]:
    queries = [lay_out(q.to(dtype), case["query_layout"]) for q, (dtype, _) in zip(query, dtypes, strict=True)]
    keys = [lay_out_key(k.to(dtype), layout, case["shift"]) for k, (_, dtype) in zip(key, dtypes, strict=True)]
    return queries, keys


@dataclass
class Call:
    """One call: the problem, the terms that enter the loss, what asks for a gradient, which keys' come in factors."""

    problem: Problem
    used: tuple[str, ...]
    need_query: list[bool]
    need_key: list[bool]
    offset: list[bool]
    mask: bool
    twice: bool


def call_of(case: Case) -> Call:
    """The same for the same case, on every machine."""
    source = Source(case["seed"])
    layers, batch, tokens, width = (case[name] for name in ("layers", "batch", "tokens", "width"))
    padding = padding_of(case, source)
    region = region_of(case, source)
    wanted = case["spread"] / (abs(case["scale"]) or 1) / math.sqrt(width) / case["key_size"]
    size = min(max(wanted, 1e-4), 1e4)
    query = [size * source.normal(batch, width) for _ in range(layers)]
    key = [case["key_size"] * source.normal(batch, tokens, width) for _ in range(layers)]
    teacher_query = [q + 0.1 * min(case["distance"], 1) * size * source.normal(batch, width) for q in query]
    teacher_key = [k + case["distance"] * case["key_size"] * source.normal(batch, tokens, width) for k in key]
    poisoned = {"key": key, "query": query, "teacher_key": teacher_key, "teacher_query": teacher_query}
    if case["poison"] and batch:
        target = poisoned[case["poison"]][source.index(layers)]
        target[tuple(source.index(size) for size in target.shape)] = float(case["poison_value"])
    if padding is not None:
        for k in (*key, *teacher_key):
            k[padding] = torch.nan
    if case["shared_key"]:
        key, teacher_key = [key[0]] * layers, [teacher_key[0]] * layers
    kinds = DTYPES[case["query_dtype"]], DTYPES[case["key_dtype"]]
    odd = [layer % 2 == 1 for layer in range(layers)]
    dtypes = [kinds[::-1] if case["odd_layers"] == "swapped" and second else kinds for second in odd]
    queries, keys = attention_of(query, key, dtypes, case, case["key_layout"])
    scale = [case["scale"] * (1 + 0.1 * layer) for layer in range(layers)]
    teacher = None
    if case["teacher_dtype"]:
        same = [(DTYPES[case["teacher_dtype"]],) * 2] * layers
        teacher = QueryAttention(
            *attention_of(teacher_query, teacher_key, same, case, case["teacher_layout"]), [1.1 * s for s in scale]
        )
    used = TERMS if case["used"] == "all" else tuple(case["used"].split())
    need = case["need"]
    return Call(
        Problem(queries, keys, scale, region, padding, teacher, incoming_of(case, source)),
        used,
        [need in ("all", "query") or (need == "odd" and second) for second in odd],
        [
            need in ("all", "key") or (need == "odd" and not second) or (need == "one_key" and layer == 0)
            for layer, second in enumerate(odd)
        ],
        [case["offset"] == "all" or (case["offset"] == "odd" and second) for second in odd],
        case["padding_argument"] == "key_padding_mask",
        case["twice"],
    )


def incoming_of(case: Case, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    shape, kind = (case["layers"], case["batch"]), case["incoming"]
    dtype = torch.float64 if in_double(case) else torch.float32
    size = {"large": 1024.0, "small": 1e-3}.get(kind, 1.0)
    made = []
    for _ in range(3):
        values = (size * source.normal(*shape)).to(dtype)
        if kind == "ones":
            values = torch.ones((), dtype=dtype).expand(shape)
        elif kind == "zeros":
            values = torch.zeros(shape, dtype=dtype)
        elif kind == "transposed":
            values = values.t().contiguous().t()
        made.append(values)
    return made[0], made[1], made[2]


# --- one call on one backend -----------------------------------------------------------------------------------------


@dataclass
class Found:
    """Gradients that were not asked for, and those of keys whose factors were taken, are None."""

    terms: AttentionTerms
    grad_query: list[Tensor | None]
    grad_key: list[Tensor | None]
    factors: list[Tensor | None]
    again: list[Tensor | None]  # all gradients, from a second backward pass


def solve(call: Call, backend: str) -> Found:
    problem = call.problem
    query = [q.detach().requires_grad_(needed) for q, needed in zip(problem.query, call.need_query, strict=True)]
    key = [k.detach().requires_grad_(needed) for k, needed in zip(problem.key, call.need_key, strict=True)]
    dtype = problem.incoming[0].dtype
    offset = [
        torch.zeros(k.shape[:2], dtype=dtype, requires_grad=True) if taken else None
        for k, taken in zip(key, call.offset, strict=True)
    ]
    student = QueryAttention(query, key, problem.scale, None if call.mask else problem.padding)
    terms = attention_terms(
        with_offset(student, offset),
        problem.region,
        teacher=problem.teacher,
        key_padding_mask=problem.padding if call.mask else None,
        backend=backend,
    )
    outputs = [
        (getattr(terms, name), incoming)
        for name, incoming in zip(TERMS, problem.incoming, strict=True)
        if name in call.used
    ]
    leaves = [leaf for leaf in (*query, *key, *offset) if leaf is not None and leaf.requires_grad]
    rounds: list[dict[int, Tensor | None]] = []
    for _ in range(2 if call.twice else 1):
        gradients = torch.autograd.grad(
            [output for output, _ in outputs],
            leaves,
            [incoming for _, incoming in outputs],
            allow_unused=True,
            retain_graph=True,
        )
        rounds.append({id(leaf): gradient for leaf, gradient in zip(leaves, gradients, strict=True)})
    first, last = ([round.get(id(leaf)) for leaf in (*query, *key, *offset)] for round in (rounds[0], rounds[-1]))
    layers = len(key)
    return Found(
        AttentionTerms(*(term.detach() for term in terms)),
        first[:layers],
        first[layers : 2 * layers],
        first[2 * layers :],
        last,
    )


# --- the judgement ---------------------------------------------------------------------------------------------------


@contextmanager
def device_of(case: Case, backend: str) -> Iterator[None]:
    if backend != "cuda":
        yield
        return
    with emulated_cuda(multiprocessors=case["multiprocessors"], block_order=case["order"], seed=case["seed"]):
        yield


def check(case: Case, backends: Sequence[str]) -> list[str]:
    """What is wrong, by backend; [] when nothing is."""
    call = call_of(case)
    truth = truth_of(call.problem, call.used)
    wrong: list[str] = []
    before = [t.clone() for t in inputs(call)]
    for backend in backends:
        with device_of(case, backend):
            found = solve(call, backend)
        wrong += [f"{backend}: {fault}" for fault in faults(call, found, truth, backend)]
    if not all(map(same_bits, before, inputs(call))):
        wrong.append(f"{' or '.join(backends)}: an input was written")
    return wrong


def inputs(call: Call) -> list[Tensor]:
    return [*call.problem.query, *call.problem.key]


def faults(call: Call, found: Found, truth: Truth, backend: str) -> Iterator[str]:
    problem = call.problem
    if not torch.equal(found.terms.valid, truth.valid):
        yield "valid"
    for name in TERMS:
        actual = getattr(found.terms, name)
        if actual.dtype != problem.incoming[0].dtype:
            yield f"{name} is {actual.dtype}"
            continue
        ratio = excess(actual, getattr(truth, name), truth.natural[name], truth.noise[name])
        if not ratio <= 1:
            yield f"{name} is {ratio:.3g} times as wrong as allowed"
    queries, keys = asked_for(call, found, backend)
    yield from gradient_faults("query", queries, truth.grad_query, truth)
    yield from gradient_faults("key", keys, truth.grad_key, truth)
    for layer, grad_key, _ in keys:
        if grad_key is not None and problem.padding is not None and grad_key[problem.padding].any():
            yield f"grad_key[{layer}] is not 0 at padding"
    for layer, taken in enumerate(call.offset):
        if taken and backend != "reference" and found.grad_key[layer] is not None:
            yield f"key[{layer}] got a gradient beside its factors"
    gradients = [*found.grad_query, *found.grad_key, *found.factors]
    if any(a is not b and not same_bits(a, b) for a, b in zip(gradients, found.again, strict=True)):
        yield "a second backward pass gives other bits"


Gradients = list[tuple[int, Tensor | None, Tensor]]  # layer, gradient, what it must have the shape and dtype of


def asked_for(call: Call, found: Found, backend: str) -> tuple[Gradients, Gradients]:
    """The gradients by queries and by keys, those that came in factors multiplied out."""
    queries: Gradients = []
    keys: Gradients = []
    for layer, (q, k) in enumerate(zip(call.problem.query, call.problem.key, strict=True)):
        if call.need_query[layer]:
            queries.append((layer, found.grad_query[layer], q))
        if call.offset[layer] and backend != "reference":
            product, factors = None, found.factors[layer]
            if factors is not None:
                product = factors[..., None] * q[:, None].to(factors.dtype)
                product = product.masked_fill((factors == 0)[..., None], 0)  # 0 times a query that is not finite
            keys.append((layer, product, k.to(call.problem.incoming[0].dtype)))
        elif call.need_key[layer]:
            keys.append((layer, found.grad_key[layer], k))
    return queries, keys


def gradient_faults(kind: str, gradients: Gradients, expected: Tensor, truth: Truth) -> Iterator[str]:
    """expected: of all layers."""
    name = f"grad_{kind}"
    alike: dict[torch.dtype, list[int]] = {}
    values = {}
    for layer, actual, like in gradients:
        if actual is None:
            if expected[layer].any():
                yield f"{name}[{layer}] is missing"
        elif actual.shape != like.shape or actual.dtype != like.dtype:
            yield f"{name}[{layer}] is {tuple(actual.shape)} {actual.dtype}"
        else:
            alike.setdefault(actual.dtype, []).append(layer)
            values[layer] = actual
    for dtype, layers in alike.items():
        most = torch.finfo(dtype).max  # what is larger may come out infinite
        rows = truth.decided[layers]
        ratio = excess(
            torch.stack([values[layer] for layer in layers]).clamp(-most, most)[rows],
            expected[layers].clamp(-most, most)[rows],
            truth.natural[kind][layers][rows],
            truth.noise[kind][layers][rows],
            tuple(range(1, expected.dim() - 1)),
        )
        if not ratio <= 1:
            yield f"{name} of layers {layers} is {ratio:.3g} times as wrong as allowed"
