"""The whole objective: rho-weighted RAC, MRC, difficulty-aware weights and the box loss (AttBalance, section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attbalance_ext.attention import require_floating
from attbalance_ext.kernels import ops
from attbalance_ext.kernels.attention_terms.reference import AttentionTerms
from attbalance_ext.kernels.balanced_loss import reference
from attbalance_ext.kernels.balanced_loss.reference import DIFFICULTY_FROM
from attbalance_ext.kernels.choose import check_name, choose

_RHO_SOURCES = ("batch", "global", "ema", "off")


@dataclass(frozen=True)
class AttBalanceConfig:
    """Every choice of the objective; the defaults are the paper's.

    Args:
        alpha_ar: weight of the attention terms L_ar.
        alpha_l1: weight of the L1 box loss (VLTVG: 5).
        alpha_giou: weight of the GIoU box loss (VLTVG: 2).
        weight_rac: weight of RAC in L_ar.
        weight_mrc: weight of MRC in L_ar.
        rho: where Spearman's rho per layer comes from: "batch" | "global" (the batches of all ranks together; the
            same B on each) | "ema" (a running average of the batch's, a buffer saved with the module) | "off" (every
            rho' is 1) | a tuple of L fixed values.
        rho_momentum: what "ema" keeps of its past each training step, in [0, 1).
        difficulty_from: what W_adw is computed from: "sum" over layers (as the paper writes it) | "mean" | "last" one.
        detach_difficulty: stop the gradient through W_adw.
        adw: False sets the actual difficulty weight W_adw to 1.
        odw: False sets the objective difficulty weight W_odw to 1.

    Raises:
        ValueError: an unknown name, a momentum outside [0, 1), or an alpha that is not finite.
    """

    alpha_ar: float = 1.0
    alpha_l1: float = 1.0
    alpha_giou: float = 1.0
    weight_rac: float = 1.0
    weight_mrc: float = 1.0
    rho: str | tuple[float, ...] = "batch"
    rho_momentum: float = 0.9
    difficulty_from: str = "sum"
    detach_difficulty: bool = False
    adw: bool = True
    odw: bool = True

    def __post_init__(self) -> None:
        for name in ("alpha_ar", "alpha_l1", "alpha_giou", "weight_rac", "weight_mrc"):
            value = getattr(self, name)
            if not _is_finite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if isinstance(self.rho, str):
            if self.rho not in _RHO_SOURCES:
                raise ValueError(
                    f"rho must be one of {', '.join(_RHO_SOURCES)} or a tuple of L numbers, got {self.rho!r}"
                )
        elif not isinstance(self.rho, tuple) or not all(_is_finite(value) for value in self.rho):
            raise ValueError(
                f"rho must be one of {', '.join(_RHO_SOURCES)} or a tuple of L finite numbers, got {self.rho!r}"
            )
        if not _is_finite(self.rho_momentum) or not 0 <= self.rho_momentum < 1:
            raise ValueError(f"rho_momentum must be in [0, 1), got {self.rho_momentum!r}")
        if self.difficulty_from not in DIFFICULTY_FROM:
            raise ValueError(
                f"difficulty_from must be one of {', '.join(DIFFICULTY_FROM)}, got {self.difficulty_from!r}"
            )


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


class AttBalanceOutput(NamedTuple):
    """The objective and its unreduced parts; only ``loss`` carries a gradient.

    loss: scalar. attention (L_ar), box (alpha_l1 L1 + alpha_giou (1 - GIoU)), rac (sum_l rho'_l RAC_l), mrc (sum_l
    MRC_l), l1, giou (the loss 1 - GIoU; both summed over stages), iou (last stage), adw (W_adw), odw (W_odw): (B,).
    rho: (L,), the rho that weighted RAC.
    """

    loss: Tensor
    attention: Tensor
    box: Tensor
    rac: Tensor
    mrc: Tensor
    l1: Tensor
    giou: Tensor
    iou: Tensor
    adw: Tensor
    odw: Tensor
    rho: Tensor


class AttBalanceLoss(nn.Module):
    """The AttBalance objective in one fused op: value and gradients together.

    ``L = mean over the batch of alpha_ar L_ar + W_odw W_adw (alpha_l1 L1 + alpha_giou (1 - GIoU))``

    Args:
        config: the choices of the objective.
        backend: "auto" | "reference" | "cpu" | "triton" | "cuda", as in :func:`attention_terms`.
    """

    rho_average: Tensor

    def __init__(self, config: AttBalanceConfig | None = None, backend: str = "auto") -> None:
        super().__init__()
        check_name(backend)
        if config is None:
            config = AttBalanceConfig()
        elif not isinstance(config, AttBalanceConfig):
            raise TypeError(f"config must be an AttBalanceConfig, got {type(config).__name__}")
        self.config = config
        self.backend = backend
        # Empty until the first training step tells L.
        self.register_buffer("rho_average", torch.zeros(0), persistent=self.config.rho == "ema")

    def forward(
        self,
        terms: AttentionTerms | None,
        pred_boxes: Tensor,
        target_boxes: Tensor,
        *,
        box_ratio: Tensor | None = None,
    ) -> AttBalanceOutput:
        """The objective of one batch.

        Args:
            terms: what :func:`attention_terms` returned; None for the plain box loss (the last epochs).
            pred_boxes: (B, 4) cxcywh in [0, 1], or (S, B, 4) for S supervised stages: their box losses are summed,
                the last stage gives the IoU.
            target_boxes: (B, 4) cxcywh; a constant, no gradient.
            box_ratio: (B,) box area / image area; default w * h of ``target_boxes``. Letterboxed data passes it.

        Raises:
            TypeError, ValueError: wrong types, ranks, shapes or devices; the message names the argument.
        """
        pred, target = _boxes(pred_boxes, target_boxes)
        if terms is not None:
            _check_terms(terms, target)
        batch = target.shape[0]
        dtypes = (pred.dtype, target.dtype if terms is None else terms.rac.dtype)
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        pred, target = pred.to(dtype), target.detach().to(dtype)
        if box_ratio is None:
            ratio = target[:, 2] * target[:, 3]
        else:
            ratio = _per_sample("box_ratio", box_ratio, target).to(dtype)
        if terms is None:
            # Three tensors: torch.compile refuses an autograd.Function that is given one tensor twice.
            in_box, rac, mrc = (target.new_zeros(0, batch) for _ in range(3))
            valid = target.new_ones(batch, dtype=torch.bool)
            rho = None
        else:
            in_box, rac, mrc = terms.in_box.detach().to(dtype), terms.rac.to(dtype), terms.mrc.to(dtype)
            valid = terms.valid
            rho = self._rho(in_box, valid, pred, target)
        weights = self._weights(plain=terms is None)
        chosen = choose(self.backend, target.device.type, dtype)
        if chosen == "reference":
            objective = reference.balanced_loss(in_box, rac, mrc, valid, pred, target, ratio, rho, *weights)
        else:
            objective = ops.balanced_loss(
                chosen,
                weights,
                in_box.contiguous(),
                rac.contiguous(),
                mrc.contiguous(),
                valid.contiguous(),
                pred.contiguous(),
                target.contiguous(),
                ratio.contiguous(),
                rho,
            )
        attention, box, sum_rac, sum_mrc, l1, giou, iou, actual, objective_weight = objective.samples.unbind(0)
        return AttBalanceOutput(
            objective.loss, attention, box, sum_rac, sum_mrc, l1, giou, iou, actual, objective_weight, objective.rho
        )

    def _weights(self, plain: bool) -> ops.Weights:
        config = self.config
        return ops.Weights(
            config.alpha_ar,
            config.alpha_l1,
            config.alpha_giou,
            config.weight_rac,
            config.weight_mrc,
            DIFFICULTY_FROM.index(config.difficulty_from),
            config.detach_difficulty,
            config.adw,
            config.odw,
            plain,
        )

    @torch.no_grad()
    def _rho(self, in_box: Tensor, valid: Tensor, pred: Tensor, target: Tensor) -> Tensor | None:
        """The L values of rho, or None to let the op compute them over this batch."""
        source, layers = self.config.rho, in_box.shape[0]
        if source == "batch":
            return None
        if source == "off":
            return in_box.new_zeros(layers)
        if isinstance(source, tuple):
            if len(source) != layers:
                raise ValueError(f"config.rho has {len(source)} values, the terms have {layers} layers")
            rho = in_box.new_empty(layers)
            for layer, value in enumerate(source):
                rho[layer].fill_(value)  # new_tensor would copy from the host, and wait for the device
            return rho
        iou, _ = reference.box_iou(pred[-1], target)
        if source == "global":
            return reference.spearman_rho(*_gather(in_box, iou, valid))
        if self.rho_average.numel() not in (0, layers):
            raise ValueError(f"rho_average has {self.rho_average.numel()} layers, the terms have {layers}")
        if not self.training and self.rho_average.numel():
            return self.rho_average.to(in_box.dtype)
        rho = reference.spearman_rho(in_box, iou, valid)
        if self.training:
            if self.rho_average.numel():
                rho = torch.lerp(rho, self.rho_average.to(rho.dtype), self.config.rho_momentum)
            self.rho_average = rho
        return rho

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}rho_average")
        if isinstance(saved, Tensor) and saved.dim() == 1 and saved.shape != self.rho_average.shape:
            self.rho_average = self.rho_average.new_zeros(saved.shape)  # L is known only to the checkpoint
        super()._load_from_state_dict(state_dict, prefix, *args)


def _gather(in_box: Tensor, iou: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """in_box (L, W*B), iou (W*B,), valid (W*B,) of all W ranks, in one collective."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return in_box, iou, valid
    packed = torch.cat([in_box, iou[None], valid[None].to(in_box.dtype)]).contiguous()
    gathered = packed.new_empty(dist.get_world_size() * packed.shape[0], packed.shape[1])
    dist.all_gather_into_tensor(gathered, packed)
    gathered = gathered.unflatten(0, (-1, packed.shape[0])).transpose(0, 1).flatten(1)
    return gathered[:-2], gathered[-2], gathered[-1] > 0


def _boxes(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """pred as (S, B, 4) and target (B, 4), checked."""
    require_floating("pred_boxes", pred)
    require_floating("target_boxes", target)
    if target.dim() != 2 or target.shape[1] != 4:
        raise ValueError(f"target_boxes must be (B, 4), got shape {tuple(target.shape)}")
    if pred.dim() not in (2, 3) or pred.shape[-2:] != target.shape:
        raise ValueError(
            f"pred_boxes must be (B, 4) or (S, B, 4) with the (B, 4) = {tuple(target.shape)} of target_boxes, "
            f"got shape {tuple(pred.shape)}"
        )
    if pred.dim() == 3 and pred.shape[0] == 0:
        raise ValueError("pred_boxes (S, B, 4) needs at least one stage")
    if pred.device != target.device:
        raise ValueError(f"pred_boxes must be on {target.device} like target_boxes, got {pred.device}")
    return (pred if pred.dim() == 3 else pred[None]), target


def _per_sample(name: str, tensor: Tensor, target: Tensor) -> Tensor:
    require_floating(name, tensor)
    if tensor.shape != target.shape[:1]:
        raise ValueError(f"{name} must be (B,) = ({target.shape[0]},), got shape {tuple(tensor.shape)}")
    if tensor.device != target.device:
        raise ValueError(f"{name} must be on {target.device} like target_boxes, got {tensor.device}")
    return tensor.detach()


def _check_terms(terms: AttentionTerms, target: Tensor) -> None:
    if not isinstance(terms, AttentionTerms):
        raise TypeError(f"terms must be AttentionTerms or None, got {type(terms).__name__}")
    named = {name: getattr(terms, name) for name in ("in_box", "rac", "mrc")}
    for name, tensor in named.items():
        require_floating(f"terms.{name}", tensor)
    for name, tensor in named.items():
        if tensor.dim() != 2 or tensor.shape[1] != target.shape[0] or tensor.shape != terms.rac.shape:
            raise ValueError(
                f"terms.{name} must be (L, B) with B = {target.shape[0]} like target_boxes, "
                f"got shape {tuple(tensor.shape)}"
            )
        if tensor.device != target.device:
            raise ValueError(f"terms.{name} must be on {target.device} like target_boxes, got {tensor.device}")
    if not isinstance(terms.valid, Tensor):
        raise TypeError(f"terms.valid must be a bool tensor (B,), got {type(terms.valid).__name__}")
    if terms.valid.dtype != torch.bool or terms.valid.shape != target.shape[:1]:
        raise ValueError(
            f"terms.valid must be (B,) = ({target.shape[0]},) bool, got {terms.valid.dtype} {tuple(terms.valid.shape)}"
        )
    if terms.valid.device != target.device:
        raise ValueError(f"terms.valid must be on {target.device} like target_boxes, got {terms.valid.device}")
