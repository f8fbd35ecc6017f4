"""Kullback-Leibler and other divergences for JAX: PyTorch parity and distillation."""

from . import losses as losses, reference as reference
from ._api.cross_entropy import cross_entropy as cross_entropy
from ._api.distillation import (
    distillation_loss as distillation_loss,
    distillation_loss_with_metrics as distillation_loss_with_metrics,
)
from ._api.list_builders import (
    sampled_teacher as sampled_teacher,
    top_k_teacher as top_k_teacher,
)
from ._api.metrics import DistillationMetrics as DistillationMetrics
from ._api.token_log_probs import token_log_probs as token_log_probs
from ._divergence.catalogue import (
    AlphaDivergence as AlphaDivergence,
    ForwardKL as ForwardKL,
    JensenShannon as JensenShannon,
    ReverseKL as ReverseKL,
    SkewForwardKL as SkewForwardKL,
    SkewReverseKL as SkewReverseKL,
    SymmetricKL as SymmetricKL,
    TotalVariation as TotalVariation,
)
from ._divergence.mixture import Mixture as Mixture
from ._source.function_head import FunctionHead as FunctionHead
from ._source.linear_head import LinearHead as LinearHead
from ._source.sparse_teacher import SparseTeacher as SparseTeacher
from ._torch.check_distributions import check_distributions as check_distributions
from ._torch.kl_div import kl_div as kl_div, KLDivLoss as KLDivLoss


__version__ = "0.1.0"
