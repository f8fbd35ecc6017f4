"""PyTorch's `kl_div`: values, dtypes, special values, gradients and warnings."""

import dataclasses
import functools as ft

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._util.compat import match_varying
from .conventions import (
    check_arrays,
    check_reduction,
    legacy_reduction,
    promote,
    reduce_loss,
    result_dtype,
)


def kl_div(
    input: ArrayLike,
    target: ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Array:
    r"""KL divergence from log-probabilities, as `torch.nn.functional.kl_div`.

    With `input` $x = \log q$ and `target` $t = p$, each element's loss is

    $$ \ell = t \, (\log t - x), \qquad
       \partial \ell / \partial x = -t, \qquad
       \partial \ell / \partial t = \log t + 1 - x, $$

    and for `log_target=True`, where $t = \log p$,

    $$ \ell = e^t \, (t - x), \qquad
       \partial \ell / \partial x = -e^t, \qquad
       \partial \ell / \partial t = e^t \, (t - x + 1), $$

    so the sum over a distribution is KL(target ‖ exp(input)): the model comes first,
    the observations second.

    `reduction="mean"`, PyTorch's default, divides by the number of elements. That is
    not the KL divergence, and it warns: `"batchmean"` divides by the first dimension of
    `input` (before broadcasting), and is the KL of a `[batch, outcomes]` array. An
    `input` of shape `[batch, tokens, outcomes]` is divided by `batch` only.

    Special values are PyTorch's. `0 log 0` is 0, but the product with an infinite
    `input` is NaN, as is a negative `target`, or a `target` of `-inf` with
    `log_target=True`. The gradient of `input` is finite there; that of `target` is NaN.
    On CPU and TPU, XLA takes subnormal numbers (below 1.2e-38 in float32) for 0, as
    PyTorch does after `torch.set_flush_denormal(True)`, and so does this.

    float16 and bfloat16 are computed in float32 and rounded once, to the dtype that
    PyTorch gives: the wider of the two, float32 for float16 with bfloat16, and a 0-d
    array does not widen an array with dimensions. Each gradient has its argument's
    dtype. Both gradients can be differentiated again; for forward mode (`jax.jvp`,
    `jax.linearize`) use `jaxkl.reference.kl_div`.

    Args:
      input: Log-probabilities $\log q$, of any shape.
      target: Probabilities $p$, or their logarithms if `log_target`. `input` and
        `target` broadcast, either way.
      size_average: Deprecated, see `reduction`.
      reduce: Deprecated, see `reduction`. If this or `size_average` is given, it
        overrides `reduction`: `reduce=False` is `"none"`, else `size_average=False` is
        `"sum"`, else `"mean"`. (A `reduction` of `"batchmean"` still divides the result
        by the batch size, as in PyTorch.)
      reduction: `"none"`, `"sum"`, `"mean"` or `"batchmean"`.
      log_target: Whether `target` holds logarithms.

    Returns:
      The loss: a scalar, or of the broadcast shape for `"none"`.

    Raises:
      TypeError: If `input` or `target` is not float16, bfloat16, float32 or float64, or
        another argument is not a `bool` (or None, where that is the default).
      ValueError: If the shapes do not broadcast, or `reduction` is unknown.

    Example:
      One distribution, KL = 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5):

      >>> import jax.numpy as jnp
      >>> input, target = jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[0.25, 0.75]])
      >>> print(f"{kl_div(input, target, reduction='batchmean'):.4f}")
      0.1308

    References:
      [torch.nn.functional.kl_div](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.kl_div.html)
    """
    if size_average is None and reduce is None:
        over_elements = check_reduction(reduction)
    else:
        over_elements = legacy_reduction(size_average, reduce)
    arrays = check_arrays(input, target, log_target)
    return _kl_div(*arrays, over_elements, reduction == "batchmean", bool(log_target))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False)
class KLDivLoss:
    r"""`kl_div` with its options kept, as `torch.nn.KLDivLoss`.

    A hashable constant without arrays: close over it, pass it to a jit-compiled
    function, or keep it in a pytree. As in PyTorch, `size_average` and `reduce` are
    resolved here, with their warning, and then a `reduction` of `"batchmean"` is
    forgotten, where `kl_div` divides by the batch size nevertheless. Everything else is
    checked at the call.

    Args:
      size_average: Deprecated, see `kl_div`.
      reduce: Deprecated, see `kl_div`.
      reduction: `"none"`, `"sum"`, `"mean"` or `"batchmean"`. See `kl_div`: `"mean"` is
        not the KL divergence, `"batchmean"` is.
      log_target: Whether `target` holds logarithms.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = KLDivLoss(reduction="batchmean", log_target=True)
      >>> log_q, log_p = jnp.log(jnp.array([[[0.5, 0.5]], [[0.25, 0.75]]]))
      >>> print(f"{loss(log_q, log_p):.4f}")
      0.1308

    References:
      [torch.nn.KLDivLoss](https://docs.pytorch.org/docs/stable/generated/torch.nn.KLDivLoss.html)
    """

    reduction: str
    log_target: bool

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ):
        if not (size_average is None and reduce is None):
            reduction = legacy_reduction(size_average, reduce)
        object.__setattr__(self, "reduction", reduction)
        object.__setattr__(self, "log_target", log_target)

    def __call__(self, input: ArrayLike, target: ArrayLike) -> Array:
        """The loss of log-probabilities `input` against `target`, see `kl_div`."""
        over_elements = check_reduction(self.reduction)
        per_batch = self.reduction == "batchmean"
        arrays = check_arrays(input, target, self.log_target)
        return _kl_div(*arrays, over_elements, per_batch, bool(self.log_target))


@ft.partial(jax.jit, static_argnames=("over_elements", "per_batch", "log_target"))
def _kl_div(input, target, over_elements, per_batch, log_target):
    loss: Array = _pointwise(*match_varying(input, target), log_target)  # pyright: ignore
    loss = reduce_loss(loss, input, over_elements, per_batch)
    return loss.astype(result_dtype(input, target))


@ft.partial(jax.custom_vjp, nondiff_argnames=("log_target",))
def _pointwise(input, target, log_target):
    loss, _ = _pointwise_fwd(input, target, log_target)
    return loss


def _pointwise_fwd(input, target, log_target):
    res = input, target
    input, target = promote(input, target)
    if log_target:
        return jnp.exp(target) * (target - input), res
    # For 0 log 0 = 0 a finite logarithm of 0 is enough. XLA on CPU runs this maximum
    # three times as fast as the select in `xlogy`, and it keeps the NaN of a negative
    # target.
    log = jnp.maximum(jnp.log(target), jnp.finfo(target.dtype).min)
    return target * log - target * input, res


def _pointwise_bwd(log_target, res, g):
    input, target = (x.astype(g.dtype) for x in res)
    spread = lambda input, target: tuple(jnp.broadcast_arrays(input, target))
    (all_input, all_target), collect = jax.vjp(spread, input, target)
    sum_input = lambda d: collect((d, jnp.zeros_like(d)))[0]
    sum_target = lambda d: collect((jnp.zeros_like(d), d))[1]
    # We share and expand products, and take sums, as PyTorch's own rules do. With 0,
    # inf and NaN among the factors this decides the result, also of second derivatives
    # and of sums of nothing.
    if log_target:
        prob = jnp.exp(target)
        g_all = g * spread(input, prob)[1]
        g_prob = sum_target(g * (all_target - all_input))
        d_input, d_target = sum_input(-g_all), sum_target(g_all) + g_prob * prob
    else:
        g_term = sum_target(g)
        # A zero cotangent makes the NaN of a negative target 0, as in PyTorch's xlogy.
        log = jnp.log(jnp.where((g_term == 0) & (target < 0), 1.0, target))
        d_input = sum_input(-g * all_target)
        d_target = g_term * log + _times_one(g_term, target)
        d_target += sum_target(-g * all_input)
    return d_input.astype(res[0].dtype), d_target.astype(res[1].dtype)


_pointwise.defvjp(_pointwise_fwd, _pointwise_bwd)


@jax.custom_jvp
def _times_one(g, target):
    """`g · (t / t)`, a part of the slope of `t log t`: NaN where t is 0, inf or NaN."""
    return g * target / target


@_times_one.defjvp
def _times_one_jvp(primals, tangents):
    # JAX's rule would square `target`, and lose float32 probabilities below 1e-19.
    (g, target), (d_g, d_target) = primals, tangents
    product = _times_one(g, target)
    return product, d_g * target / target + d_target * (g - product) / target
