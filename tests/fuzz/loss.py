"""Cases of `AttBalanceLoss`: outputs and gradients on each backend.

What the boxes alone decide (IoU, GIoU, L1, the gradient by the boxes) is compared with the reference in the same dtype,
for it jumps where edges meet: IoU to the last bit. Everything after that is compared with loss_truth.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from helpers import BOUND, excess, same_bits
from helpers_loss import LossProblem
from torch import Tensor

from attbalance_ext import AttBalanceConfig, AttBalanceLoss, AttBalanceOutput, AttentionTerms
from tests.fuzz.loss_truth import Expected, Truth, box_gradient_size, truth_of
from tests.fuzz.space import Case, Space
from tests.fuzz.tensors import DTYPES, PLAIN_LAYOUTS, Source, lay_out

WEIGHTS = {  # alpha_ar, alpha_l1, alpha_giou, weight_rac, weight_mrc
    "ones": (1.0, 1.0, 1.0, 1.0, 1.0),
    "vltvg": (1.0, 5.0, 2.0, 1.0, 1.0),
    "mixed": (0.7, 0.3, 1.9, 0.2, 1.7),
    "some": (0.0, 1.0, 0.0, 1.0, 0.0),
    "negative": (1.0, 1.0, 1.0, -1.0, 0.5),
}
BOXES = ("near", "apart", "equal", "cells", "points", "inverted", "tiny", "huge")

SPACE = Space(
    {
        "layers": (1, 2, 3, 4, 0, 40),
        "batch": (1, 2, 3, 4, 5, 8, 9, 31, 65, 130, 0),
        "stages": (None, None, 1, 2, 3),
        "terms": ("given", "given", "given", "given", "none"),
        "terms_dtype": ("float32", "float32", "float64"),
        "pred_dtype": ("float32", "float32", "float64", "bfloat16", "float16"),
        "target_dtype": ("float32", "float32", "float64", "bfloat16", "float16"),
        "ratio_dtype": (None, None, "float32", "float64", "bfloat16", "float16"),
        "terms_layout": PLAIN_LAYOUTS,
        "pred_layout": PLAIN_LAYOUTS,
        "target_layout": PLAIN_LAYOUTS,
        "size": (1.0, 1.0, 1e-6, 30.0, 1e4),  # of RAC and MRC
        "in_box": ("distinct", "ties", "constant", "zeros"),
        "boxes": (*BOXES, "mixed", "mixed", "mixed"),
        "valid": ("all", "some", "one", "none"),
        "poison": (*[None] * 12, "in_box", "rac", "mrc", "pred", "target", "box_ratio"),
        "poison_value": ("nan", "inf", "-inf"),
        "rho": ("batch", "batch", "batch", "off", "global", "ema", "fixed"),
        "weights": tuple(WEIGHTS),
        "difficulty_from": ("sum", "mean", "last"),
        "detach_difficulty": (False, True),
        "adw": (True, True, False),
        "odw": (True, True, False),
        "need": ("all", "all", "pred", "rac", "mrc", "rac mrc"),
        "incoming": (1.0, 1.0, 1024.0, 1e-3),
        "twice": (False, False, False, True),
        "seed": range(2**31),
    }
)


SIZES = ("layers", "batch")
IN_DOUBLE = ("terms_dtype", "pred_dtype", "target_dtype")  # where one is float64, the arithmetic may be


def cost(case: Case, row: int) -> int:
    return max(case["layers"], 1) * case["batch"] * 40


# --- from a case to tensors ------------------------------------------------------------------------------------------


def boxes_of(kind: str, batch: int, stages: int, source: Source) -> tuple[Tensor, Tensor]:
    """(S, B, 4) predicted and (B, 4) true."""
    target = torch.cat([0.2 + 0.6 * source.uniform(batch, 2), 0.1 + 0.3 * source.uniform(batch, 2)], dim=1)
    pred = target + 0.3 * (source.uniform(stages, batch, 4) - 0.5)
    pred[..., 2:].abs_()
    if kind == "apart":
        pred = torch.cat([source.uniform(stages, batch, 2), 0.1 * source.uniform(stages, batch, 2)], dim=-1)
    elif kind == "equal":
        pred = target.expand(stages, batch, 4).clone()
    elif kind == "cells":
        pred, target = (pred * 4).round() / 4, (target * 4).round() / 4
    elif kind == "points":
        pred[..., 2:] *= (source.uniform(stages, batch, 2) < 0.5).double()
        target[..., 2:] *= (source.uniform(batch, 2) < 0.5).double()
    elif kind == "inverted":
        pred[..., 2:] *= (source.uniform(stages, batch, 2) - 0.5).sign()
        target[..., 2:] *= (source.uniform(batch, 2) - 0.5).sign()
    elif kind == "tiny":
        pred, target = 1e-6 * pred, 1e-6 * target
    elif kind == "huge":
        pred, target = 1e6 * pred, 1e3 * target
    return pred, target


@dataclass
class Call:
    """One call, what asks for a gradient, and the gradient that comes in for the loss. problem.in_box is None where
    there are no terms."""

    problem: LossProblem
    with_terms: bool
    config: AttBalanceConfig
    need: tuple[str, ...]
    incoming: float
    twice: bool


def call_of(case: Case) -> Call:
    """The same for the same case, on every machine."""
    source = Source(case["seed"])
    layers, batch, stages = case["layers"], case["batch"], case["stages"] or 1
    kind = case["boxes"]
    pred, target = boxes_of("near" if kind == "mixed" else kind, batch, stages, source)
    if kind == "mixed":
        for other in BOXES[1:]:
            chosen = source.uniform(batch) < 0.25
            others = boxes_of(other, batch, stages, source)
            pred[:, chosen], target[chosen] = others[0][:, chosen], others[1][chosen]
    in_box = source.uniform(layers, batch)
    rac, mrc = -2 * case["size"] * in_box.log(), 2 * case["size"] * source.uniform(layers, batch)
    if case["in_box"] == "ties":
        in_box = (in_box * 3).ceil() / 3
    elif case["in_box"] == "constant":
        in_box = torch.full_like(in_box, 0.25)
    elif case["in_box"] == "zeros":  # both of them
        in_box = torch.where(in_box < 0.3, -0.0, torch.where(in_box < 0.6, 0.0, in_box))
    valid = source.uniform(batch) < {"all": 2.0, "some": 0.7, "one": 0.0, "none": 0.0}[case["valid"]]
    if case["valid"] == "one" and batch:
        valid[source.index(batch)] = True
    in_box, rac = (torch.where(valid, values, 0.0) for values in (in_box, rac))
    ratio = source.uniform(batch)
    parts = {"in_box": in_box, "rac": rac, "mrc": mrc, "pred": pred, "target": target, "box_ratio": ratio}
    if case["poison"] and parts[case["poison"]].numel():
        values = parts[case["poison"]]
        values[tuple(source.index(size) for size in values.shape)] = float(case["poison_value"])

    in_box, rac, mrc = (lay_out(v.to(DTYPES[case["terms_dtype"]]), case["terms_layout"]) for v in (in_box, rac, mrc))
    pred = pred.to(DTYPES[case["pred_dtype"]])
    if case["stages"] is None:
        pred = lay_out(pred[0], case["pred_layout"])
    elif case["pred_layout"] == "transposed":  # (B, S, 4) in memory
        pred = pred.transpose(0, 1).contiguous().transpose(0, 1)
    values = WEIGHTS[case["weights"]]
    config = AttBalanceConfig(
        *values,
        rho=tuple(source.normal(layers).tolist()) if case["rho"] == "fixed" else case["rho"],
        difficulty_from=case["difficulty_from"],
        detach_difficulty=case["detach_difficulty"],
        adw=case["adw"],
        odw=case["odw"],
    )
    return Call(
        LossProblem(
            in_box,
            rac,
            mrc,
            valid,
            pred,
            lay_out(target.to(DTYPES[case["target_dtype"]]), case["target_layout"]),
            ratio.to(DTYPES[case["ratio_dtype"]]) if case["ratio_dtype"] else None,
        ),
        case["terms"] == "given",
        config,
        ("rac", "mrc", "pred") if case["need"] == "all" else tuple(case["need"].split()),
        case["incoming"],
        case["twice"],
    )


# --- one call on one backend -----------------------------------------------------------------------------------------


@dataclass
class Found:
    """The output and the gradients that were asked for."""

    output: AttBalanceOutput
    gradients: dict[str, Tensor]
    again: dict[str, Tensor]


def solve(call: Call, backend: str) -> Found:
    problem = call.problem
    leaves = {
        name: getattr(problem, name).detach().requires_grad_(name in call.need) for name in ("rac", "mrc", "pred")
    }
    terms = None
    if call.with_terms:
        terms = AttentionTerms(problem.in_box, leaves["rac"], leaves["mrc"], problem.valid)
    output = AttBalanceLoss(call.config, backend)(terms, leaves["pred"], problem.target, box_ratio=problem.box_ratio)
    wanted = [name for name in call.need if call.with_terms or name == "pred"]
    rounds: list[dict[str, Tensor]] = []
    for _ in range(2 if call.twice else 1):
        gradients: Sequence[Tensor] = ()
        if wanted:
            incoming = torch.full_like(output.loss, call.incoming)
            gradients = torch.autograd.grad(
                output.loss, [leaves[name] for name in wanted], incoming, retain_graph=True, materialize_grads=True
            )
        rounds.append(dict(zip(wanted, gradients, strict=True)))
    return Found(AttBalanceOutput(*(value.detach() for value in output)), rounds[0], rounds[-1])


# --- the judgement ---------------------------------------------------------------------------------------------------


def check(case: Case, backends: Sequence[str]) -> list[str]:
    """What is wrong, by backend; [] when nothing is."""
    call = call_of(case)
    reference = solve(call, "reference")
    truth = truth_of(call.problem, call.with_terms, call.config, reference.output)
    wrong = []
    before = [t.clone() for t in inputs(call)]
    for backend in backends:
        found = reference if backend == "reference" else solve(call, backend)
        wrong += [f"{backend}: {fault}" for fault in faults(call, found, reference, truth)]
    if not all(map(same_bits, before, inputs(call))):
        wrong.append(f"{' or '.join(backends)}: an input was written")
    return wrong


def inputs(call: Call) -> list[Tensor]:
    values = (getattr(call.problem, field.name) for field in fields(call.problem))
    return [value for value in values if value is not None]


def faults(call: Call, found: Found, reference: Found, truth: Truth) -> Iterator[str]:
    output, given = found.output, reference.output
    if not torch.equal(output.iou.isnan(), given.iou.isnan()) or not torch.equal(
        output.iou.nan_to_num(), given.iou.nan_to_num()
    ):
        yield "iou has not the reference's bits"
    stages = call.problem.pred.shape[0] if call.problem.pred.dim() == 3 else 1
    config = call.config
    box_size = abs(config.alpha_l1) * given.l1 + abs(config.alpha_giou) * (stages + given.giou.abs())
    expected = {
        "l1": Expected(given.l1.double(), given.l1.double()),
        "giou": Expected(given.giou.double(), stages + given.giou.double().abs()),
        "box": Expected(given.box.double(), box_size.double()),
        **truth.outputs,
    }
    for name, wanted in expected.items():
        yield from value_faults(name, getattr(output, name), wanted, getattr(given, name))
    if set(found.gradients) != set(reference.gradients):
        yield f"gradients for {set(found.gradients)}"
    for name, gradient in found.gradients.items():
        like = getattr(call.problem, name)
        if gradient.shape != like.shape or gradient.dtype != like.dtype:
            yield f"grad_{name} is {tuple(gradient.shape)} {gradient.dtype}"
            continue
        if name == "pred":
            size = (box_gradient_size(call.problem, config, given) * abs(call.incoming)).expand(gradient.shape)
            numbers = given.box.isfinite()  # autograd loses a NaN where a maximum takes the other side: left open
            expected_gradient = reference.gradients[name][..., numbers, :]
            wanted = Expected(expected_gradient.double(), size[..., numbers, :])
            # It is rounded to a half type itself, maybe to the other neighbour.
            half = BOUND[gradient.dtype] if gradient.dtype.itemsize == 2 else 0.0
            rounding = half * wanted.value.abs().nan_to_num(0, 0, 0)
            yield from value_faults("grad_pred", gradient[..., numbers, :], wanted, expected_gradient, rounding)
        else:
            wanted = truth.gradients[name].times(call.incoming)
            yield from value_faults(f"grad_{name}", gradient, wanted, reference.gradients[name])
        if not same_bits(gradient, found.again[name]):
            yield f"a second backward pass gives grad_{name} other bits"


def value_faults(
    name: str, actual: Tensor, expected: Expected, given: Tensor, noise: Tensor | float = 0.0
) -> Iterator[str]:
    """Not finite where the reference is not, and nowhere else; numbers as expected. ``noise``: what is expected may be
    wrong by that itself."""
    if actual.dtype != given.dtype:
        yield f"{name} is {actual.dtype}"
        return
    if not torch.equal(actual.isfinite(), given.isfinite()):
        yield f"{name} is not finite in other places than the reference's"
        return
    most = torch.finfo(actual.dtype).max
    numbers = actual.isfinite() & expected.value.isfinite()
    ratio = excess(
        torch.where(numbers, actual, 0),
        torch.where(numbers, expected.value.clamp(-most, most), 0.0),
        expected.natural,
        noise + torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).tiny,
    )
    if not ratio <= 1:
        yield f"{name} is {ratio:.3g} times as wrong as allowed"
