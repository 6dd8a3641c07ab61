"""Cases of wrong arguments: one or two, anywhere in a call of either op. Every backend refuses the same calls with the
same class of exception and the same words, before anything backend-specific runs; what one takes, all take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attbalance_ext import (
    AttBalanceConfig,
    AttBalanceLoss,
    AttentionTerms,
    BoxRegion,
    QueryAttention,
    attention_map,
    attention_terms,
)
from tests.fuzz.space import Case, Space

# A value of any kind -> another value. Of tensors all apply; of other arguments those that do not need a tensor.
TENSOR_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "rank more": lambda t: t[None],
    "rank less": lambda t: t[0] if t.dim() and t.shape[0] else t.reshape(-1),
    "scalar": lambda t: t.new_zeros(()),
    "first longer": lambda t: torch.cat([t, t[:1]]),
    "first shorter": lambda t: t[:-1],
    "last longer": lambda t: torch.cat([t, t[..., :1]], dim=-1),
    "last shorter": lambda t: t[..., :-1],
    "second longer": lambda t: torch.cat([t, t[:, :1]], dim=1) if t.dim() > 1 else t[:-1],
    "first empty": lambda t: t[:0],
    "last empty": lambda t: t[..., :0],
    "transposed": lambda t: t.transpose(0, -1),
    "flat": lambda t: t.reshape(-1),
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t.bool(),
    "float": lambda t: t.float(),
    "complex": lambda t: t.to(torch.cfloat),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "elsewhere": lambda t: t.to("meta"),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "number": lambda t: 1.0,
}
PLAIN_CHANGES: dict[str, Callable[[Any], Any]] = {
    "none": lambda value: None,
    "text": lambda value: "0.5",
    "object": lambda value: ...,
    "twice": lambda value: [value, value],
    "nothing": lambda value: [],
    "negative": lambda value: -1,
    "nan": lambda value: math.nan,
    "zero": lambda value: 0,
    "negative pair": lambda value: (-3, 4),
    "pair of floats": lambda value: (3.0, 4.0),
    "triple": lambda value: (2, 2, 3),
    "huge pair": lambda value: (2**31, 2**31),
}
CHANGES = TENSOR_CHANGES | PLAIN_CHANGES

B, N, D, L = 2, 12, 4, 2


def terms_arguments() -> dict[str, Any]:
    return {
        "query": torch.ones(B, D),
        "key": torch.ones(B, N, D),
        "scale": 0.5,
        "padding": torch.zeros(B, N, dtype=torch.bool),
        "key_padding_mask": None,
        "boxes": torch.full((B, 4), 0.5),
        "grids": (3, 4),
        "rule": "touch",
        "region": None,  # a tensor in place of the boxes
        "teacher_query": torch.ones(B, D),
        "teacher_key": torch.ones(B, N, D),
        "teacher_scale": 0.5,
        "student": None,  # in place of the student
        "teacher": None,
    }


def call_terms(arguments: dict[str, Any], backend: str) -> object:
    student = QueryAttention(*(arguments[name] for name in ("query", "key", "scale", "padding")))
    teacher = QueryAttention(*(arguments[f"teacher_{name}"] for name in ("query", "key", "scale")))
    region = arguments["region"]
    if region is None:
        region = BoxRegion(arguments["boxes"], arguments["grids"], arguments["rule"])
    terms = attention_terms(
        student if arguments["student"] is None else arguments["student"],
        region,
        teacher=teacher if arguments["teacher"] is None else arguments["teacher"],
        key_padding_mask=arguments["key_padding_mask"],
        backend=backend,
    )
    attention_map(student)
    return terms


def loss_arguments() -> dict[str, Any]:
    return {
        "in_box": torch.full((L, B), 0.5),
        "rac": torch.ones(L, B),
        "mrc": torch.ones(L, B),
        "valid": torch.ones(B, dtype=torch.bool),
        "pred_boxes": torch.full((B, 4), 0.5),
        "target_boxes": torch.full((B, 4), 0.5),
        "box_ratio": torch.full((B,), 0.5),
        "terms": None,  # in place of the four
        "config": None,
        "rho": "batch",
        "alpha_l1": 1.0,
        "difficulty_from": "sum",
    }


def call_loss(arguments: dict[str, Any], backend: str) -> object:
    config = AttBalanceConfig(**{name: arguments[name] for name in ("rho", "alpha_l1", "difficulty_from")})
    terms = AttentionTerms(*(arguments[name] for name in ("in_box", "rac", "mrc", "valid")))
    return AttBalanceLoss(config if arguments["config"] is None else arguments["config"], backend)(
        terms if arguments["terms"] is None else arguments["terms"],
        arguments["pred_boxes"],
        arguments["target_boxes"],
        box_ratio=arguments["box_ratio"],
    )


OPS = {"terms": (terms_arguments, call_terms), "loss": (loss_arguments, call_loss)}
PLACES = [f"{op} {name}" for op, (arguments, _) in OPS.items() for name in arguments()]

# What `second` names is changed too where it belongs to the same op; for an argument that is None, a tensor of ones is
# changed.
SPACE = Space({"first": PLACES, "change": list(CHANGES), "second": [None, *PLACES], "other": list(CHANGES)})


def arguments_of(case: Case) -> tuple[str, dict[str, Any]]:
    op = case["first"].split()[0]
    arguments = OPS[op][0]()
    for place, change in ((case["first"], case["change"]), (case["second"], case["other"])):
        if place is None or place.split()[0] != op:
            continue
        name = place.split()[1]
        value = arguments[name]
        if change in TENSOR_CHANGES and not isinstance(value, Tensor):
            value = torch.ones(B, N)
        try:
            arguments[name] = CHANGES[change](value)
        except (RuntimeError, TypeError, IndexError):
            continue  # there is no such change of what the first one has left
    return op, arguments


def outcome(case: Case, backend: str) -> tuple[type, str]:
    """The class of what came out, and an exception's words without the backend's name."""
    op, arguments = arguments_of(case)
    try:
        return type(OPS[op][1](arguments, backend)), ""
    except Exception as error:  # judged by its class
        return type(error), str(error)


def check(case: Case, backends: Sequence[str]) -> list[str]:
    """What is wrong, by backend; [] when nothing is."""
    wanted = outcome(case, "reference")
    kind, message = wanted
    wrong = []
    if issubclass(kind, Exception) and kind not in (TypeError, ValueError):
        wrong.append(f"reference: {kind.__name__}: {message}")
    for backend in backends:
        found = outcome(case, backend)
        if found != wanted:
            wrong.append(f"{backend}: {found[0].__name__} {found[1]!r} for {kind.__name__} {message!r}")
    return wrong
