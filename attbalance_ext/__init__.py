"""AttBalance for PyTorch: a fused, exact loss that makes an object query attend inside its box (arXiv 2407.03243)."""

from attbalance_ext.attention import QueryAttention, attention_map
from attbalance_ext.correlation import spearman_rho
from attbalance_ext.errors import BackendUnavailable
from attbalance_ext.kernels.choose import available_backends
from attbalance_ext.loss import AttBalanceConfig, AttBalanceLoss, AttBalanceOutput
from attbalance_ext.protocol import Tap
from attbalance_ext.recorder import Recorder
from attbalance_ext.region import BoxRegion
from attbalance_ext.tap import AttentionTap
from attbalance_ext.teacher import MomentumTeacher
from attbalance_ext.terms import AttentionTerms, attention_terms

__all__ = [
    "AttBalanceConfig",
    "AttBalanceLoss",
    "AttBalanceOutput",
    "AttentionTap",
    "AttentionTerms",
    "BackendUnavailable",
    "BoxRegion",
    "MomentumTeacher",
    "QueryAttention",
    "Recorder",
    "Tap",
    "attention_map",
    "attention_terms",
    "available_backends",
    "spearman_rho",
]
