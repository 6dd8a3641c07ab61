"""`balanced_loss` in Triton: one launch of one program, the loss of a batch and all gradients.

Samples are worked on in blocks. Ranks come from counting: #below + #(below or equal), twice the average rank, so that
the sums of Spearman's rho are exact integers. Nothing that one thread stores is read by another.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attbalance_ext.kernels.balanced_loss.reference import DIFFICULTY_FROM, SAMPLE_ROWS
from attbalance_ext.kernels.balanced_loss.triton_boxes import box_giou, box_iou, load_box, sign

_ROW = {name: place for place, name in enumerate(SAMPLE_ROWS)}
_ATTENTION, _BOX, _RAC, _MRC, _L1, _GIOU, _IOU, _ADW, _ODW = (tl.constexpr(_ROW[name]) for name in SAMPLE_ROWS)
_MEAN, _LAST = (tl.constexpr(DIFFICULTY_FROM.index(name)) for name in ("mean", "last"))
_INF = tl.constexpr(float("inf"))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _ranked(in_box, valid, pred, target, sample, batch):
    """A_in and IoU of samples, and whether they are ranked: valid, both finite."""
    there = sample < batch
    x = tl.load(in_box + sample, mask=there, other=0.0)
    y = box_iou(pred, target, sample, there)
    kept = tl.load(valid + sample, mask=there, other=0) != 0
    return x, y, kept & (tl.abs(x) < _INF) & (tl.abs(y) < _INF)


@triton.jit
def _rank(values, others, kept):
    """What a block of others adds to #below + #(below or equal) of each value."""
    below, equal = others[None, :] < values[:, None], others[None, :] == values[:, None]
    return tl.sum(tl.where(kept[None, :], 2 * below.to(tl.int32) + equal.to(tl.int32), 0), 1)


@triton.jit
def _spearman(in_box, valid, pred, target, batch, block: tl.constexpr):
    """rho of in_box (B,) with the IoU, 0 where undefined; float32 of one division of integers in double."""
    count, xy = tl.zeros([block], tl.int64), tl.zeros([block], tl.int64)
    xx, yy = tl.zeros([block], tl.int64), tl.zeros([block], tl.int64)
    for first in range(0, batch, block):
        x, y, kept = _ranked(in_box, valid, pred, target, first + tl.arange(0, block), batch)
        x_rank, y_rank = tl.zeros([block], tl.int32), tl.zeros([block], tl.int32)
        for other in range(0, batch, block):
            x_others, y_others, others_kept = _ranked(in_box, valid, pred, target, other + tl.arange(0, block), batch)
            x_rank += _rank(x, x_others, others_kept)
            y_rank += _rank(y, y_others, others_kept)
        x_rank, y_rank = tl.where(kept, x_rank, 0).to(tl.int64), tl.where(kept, y_rank, 0).to(tl.int64)
        count += kept.to(tl.int64)
        xy += x_rank * y_rank
        xx += x_rank * x_rank
        yy += y_rank * y_rank
    n = tl.sum(count, 0)
    shift = n * n * n  # the mean of these ranks is their count
    covariance = (tl.sum(xy, 0) - shift).to(tl.float64)
    spread = tl.sqrt((tl.sum(xx, 0) - shift).to(tl.float64) * (tl.sum(yy, 0) - shift).to(tl.float64))
    return tl.where(spread == 0, 0.0, covariance / tl.where(spread == 0, 1.0, spread)).to(tl.float32)


@triton.jit(do_not_specialize=["layers", "stages", "batch"])
def _balanced_loss(
    in_box,  # (L, B)
    rac,  # (L, B)
    mrc,  # (L, B)
    valid,  # (B,)
    pred,  # (S, B, 4)
    target,  # (B, 4)
    box_ratio,  # (B,)
    rho,  # (L,), or None: Spearman's over this batch
    loss,  # ()
    samples,  # (9, B)
    rho_out,  # (L,)
    grad_rac,  # (L, B)
    grad_mrc,  # (L, B)
    grad_pred,  # (S, B, 4)
    alpha_ar,
    alpha_l1,
    alpha_giou,
    weight_rac,
    weight_mrc,
    share,  # 1 / B
    layers,
    stages,
    batch,
    difficulty_from: tl.constexpr,
    detach_difficulty: tl.constexpr,
    adw: tl.constexpr,
    odw: tl.constexpr,
    plain: tl.constexpr,
    block_layers: tl.constexpr,  # >= L
    block: tl.constexpr,  # samples at a time
    rank_block: tl.constexpr,
):
    layer = tl.arange(0, block_layers)
    size = batch.to(tl.int64)
    rho_weight = tl.zeros([block_layers], tl.float32)
    if not plain:
        if rho is not None:
            rhos = tl.load(rho + layer, mask=layer < layers, other=0.0)
        else:
            rhos = tl.zeros([block_layers], tl.float32)
            last_pred = pred + (stages - 1) * size * 4
            for ranked in range(layers):
                found = _spearman(in_box + ranked * size, valid, last_pred, target, batch, rank_block)
                rhos = tl.where(layer == ranked, found, rhos)
        tl.store(rho_out + layer, rhos, mask=layer < layers)
        rho_weight = rhos - tl.sum(rhos, 0) / tl.maximum(layers, 1).to(tl.float32) + 1

    total = tl.zeros([block], tl.float64)
    for first in range(0, batch, block):
        sample = first + tl.arange(0, block)
        there = sample < batch
        # The attention terms, (layers, samples), and the difficulty weights.
        place = layer[:, None] * size + sample[None, :]
        present = (layer < layers)[:, None] & there[None, :]
        weighted_rac, sum_mrc = tl.zeros([block_layers, block], tl.float32), tl.zeros([block], tl.float32)
        last_layer = (layer == layers - 1)[:, None] & there[None, :]
        layer_mrc = weighted_rac
        if not plain:
            weighted_rac = tl.where(present, rho_weight[:, None] * tl.load(rac + place, mask=present, other=0.0), 0.0)
            layer_mrc = tl.load(mrc + place, mask=present, other=0.0)
        sum_rac, sum_mrc = tl.sum(weighted_rac, 0), tl.sum(layer_mrc, 0)
        attention = weight_rac * sum_rac + weight_mrc * sum_mrc
        difficulty, difficulty_share, difficult = attention, 1.0, present
        if difficulty_from == _MEAN:
            difficulty_share = 1 / tl.maximum(layers, 1).to(tl.float32)
            difficulty = attention * difficulty_share
        if difficulty_from == _LAST:
            last_rac = tl.sum(tl.where(last_layer, weighted_rac, 0.0), 0)
            last_mrc = tl.sum(tl.where(last_layer, layer_mrc, 0.0), 0)
            difficulty, difficult = weight_rac * last_rac + weight_mrc * last_mrc, last_layer
        probability = _sigmoid(difficulty)
        actual = tl.full([block], 1.0, tl.float32)
        objective = actual
        weighted = sample < 0
        if adw and not plain:
            weighted = tl.load(valid + sample, mask=there, other=0) != 0
            actual = tl.where(weighted, 0.5 + probability, 1.0)
        if odw and not plain:
            objective = 0.5 + _sigmoid(1 - tl.load(box_ratio + sample, mask=there, other=0.0))

        # The box losses.
        tx, ty, tw, th = load_box(target, sample, there)
        l1, giou_loss = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
        iou = l1
        scale = share * objective * actual
        for stage in range(stages):
            stage_place = stage * size * 4
            cx, cy, w, h = load_box(pred + stage_place, sample, there)
            iou, giou, grad_x, grad_y, grad_w, grad_h = box_giou(cx, cy, w, h, tx, ty, tw, th)
            l1 += tl.abs(cx - tx) + tl.abs(cy - ty) + tl.abs(w - tw) + tl.abs(h - th)
            giou_loss += 1 - giou
            gradient = grad_pred + stage_place + sample.to(tl.int64) * 4
            tl.store(gradient, scale * (alpha_l1 * sign(cx - tx) - alpha_giou * grad_x), mask=there)
            tl.store(gradient + 1, scale * (alpha_l1 * sign(cy - ty) - alpha_giou * grad_y), mask=there)
            tl.store(gradient + 2, scale * (alpha_l1 * sign(w - tw) - alpha_giou * grad_w), mask=there)
            tl.store(gradient + 3, scale * (alpha_l1 * sign(h - th) - alpha_giou * grad_h), mask=there)
        box = alpha_l1 * l1 + alpha_giou * giou_loss

        # Gradients of the attention terms.
        grad_difficulty = tl.zeros([block], tl.float32)
        if not detach_difficulty:
            slope = probability * (1 - probability) * difficulty_share
            grad_difficulty = tl.where(weighted, share * objective * box * slope, 0.0)
        gradient = alpha_ar * share + tl.where(difficult, grad_difficulty[None, :], 0.0)
        if plain:
            gradient = tl.zeros_like(gradient)
        tl.store(grad_rac + place, gradient * weight_rac * rho_weight[:, None], mask=present)
        tl.store(grad_mrc + place, gradient * weight_mrc, mask=present)

        row = samples + sample
        tl.store(row + _ATTENTION * size, attention, mask=there)
        tl.store(row + _BOX * size, box, mask=there)
        tl.store(row + _RAC * size, sum_rac, mask=there)
        tl.store(row + _MRC * size, sum_mrc, mask=there)
        tl.store(row + _L1 * size, l1, mask=there)
        tl.store(row + _GIOU * size, giou_loss, mask=there)
        tl.store(row + _IOU * size, iou, mask=there)
        tl.store(row + _ADW * size, actual, mask=there)
        tl.store(row + _ODW * size, objective, mask=there)
        total += tl.where(there, alpha_ar * attention + objective * actual * box, 0.0).to(tl.float64)
    tl.store(loss, (tl.sum(total, 0) / tl.maximum(batch, 1).to(tl.float64)).to(tl.float32))


class Plan(NamedTuple):
    """block_layers: the power of two that holds L. block: samples at a time. rank_block: the same where ranks are
    counted, which compares all pairs."""

    block_layers: int
    block: int
    rank_block: int
    warps: int


@functools.lru_cache(maxsize=256)
def plan(layers: int, batch: int) -> Plan:
    """Block sizes of the one program: what stays in its registers."""
    block_layers = triton.next_power_of_2(max(layers, 1))
    block = triton.next_power_of_2(min(max(batch, 16), 128))
    few = batch <= 64
    return Plan(block_layers, max(min(block, 4096 // block_layers), 1), min(block, 32 if few else 64), 4 if few else 16)


def balanced_loss(
    in_box: Tensor,
    rac: Tensor,
    mrc: Tensor,
    valid: Tensor,
    pred: Tensor,
    target: Tensor,
    box_ratio: Tensor,
    rho: Tensor | None,
    alpha_ar: float,
    alpha_l1: float,
    alpha_giou: float,
    weight_rac: float,
    weight_mrc: float,
    difficulty_from: int,
    detach_difficulty: bool,
    adw: bool,
    odw: bool,
    plain: bool,
) -> tuple[Tensor, ...]:
    """The op `balanced_loss.triton`, see ``ops.py``."""
    layers, (stages, batch, _) = in_box.shape[0], pred.shape
    loss, samples = pred.new_empty(()), pred.new_empty(len(SAMPLE_ROWS), batch)
    rho_out = pred.new_empty(0 if plain else layers)
    grad_rac, grad_mrc, grad_pred = torch.empty_like(rac), torch.empty_like(mrc), torch.empty_like(pred)
    cut = plan(layers, batch)
    with torch.cuda.device_of(pred):
        _balanced_loss[(1,)](
            in_box,
            rac,
            mrc,
            valid,
            pred,
            target,
            box_ratio,
            rho,
            loss,
            samples,
            rho_out,
            grad_rac,
            grad_mrc,
            grad_pred,
            alpha_ar,
            alpha_l1,
            alpha_giou,
            weight_rac,
            weight_mrc,
            1 / max(batch, 1),
            layers,
            stages,
            batch,
            difficulty_from=difficulty_from,
            detach_difficulty=detach_difficulty,
            adw=adw,
            odw=odw,
            plain=plain,
            block_layers=cut.block_layers,
            block=cut.block,
            rank_block=cut.rank_block,
            num_warps=cut.warps,
            enable_fp_fusion=False,  # the bits of the IoU are the reference's: ranks jump otherwise
        )
    return loss, samples, rho_out, grad_rac, grad_mrc, grad_pred
