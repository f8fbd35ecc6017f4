"""Kullback-Leibler and other divergences for JAX: PyTorch parity and distillation."""

from . import losses as losses, reference as reference
from ._check_distributions import check_distributions as check_distributions
from ._cross_entropy import cross_entropy as cross_entropy
from ._distillation import (
    distillation_loss as distillation_loss,
    distillation_loss_with_metrics as distillation_loss_with_metrics,
)
from ._divergences import (
    AlphaDivergence as AlphaDivergence,
    ForwardKL as ForwardKL,
    JensenShannon as JensenShannon,
    ReverseKL as ReverseKL,
    SkewForwardKL as SkewForwardKL,
    SkewReverseKL as SkewReverseKL,
    SymmetricKL as SymmetricKL,
    TotalVariation as TotalVariation,
)
from ._function_head import FunctionHead as FunctionHead
from ._kl_div import kl_div as kl_div, KLDivLoss as KLDivLoss
from ._linear_head import LinearHead as LinearHead
from ._metrics import DistillationMetrics as DistillationMetrics
from ._mixture import Mixture as Mixture
from ._sparse import SparseTeacher as SparseTeacher
from ._sparse_from_logits import (
    sampled_teacher as sampled_teacher,
    top_k_teacher as top_k_teacher,
)
from ._token_log_probs import token_log_probs as token_log_probs


__version__ = "0.1.0"
