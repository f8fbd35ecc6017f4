"""The cross-entropy to labels, of logits that need not be in memory."""

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from .._engine.sharding import evaluate
from .._source.function_head import FunctionHead
from .._source.linear_head import LinearHead
from .options import LabelOptions, PlanName, Reduction, suggest_keywords
from .prepare import prepare


@suggest_keywords
def cross_entropy(
    student: ArrayLike | LinearHead | FunctionHead,
    labels: ArrayLike,
    *,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    token_axes: str | Sequence[str] | None = None,
    vocab_axis: str | None = None,
    tile: int | None = None,
    plan: PlanName | None = None,
) -> jax.Array:
    r"""Cross-entropy of a student to labels.

    With $q = \mathrm{softmax}(s)$, a label $y$, smoothing $\epsilon$ and $V$ columns, a
    token's loss is

    $$ \ell = -(1 - \epsilon) \log q_y - \frac{\epsilon}{V} \sum_v \log q_v
              + z\,\mathrm{lse}(s)^2, $$

    and $\partial \ell / \partial s = q - \mathrm{onehot}(y)$ if $\epsilon$ and $z$ are
    0. Columns at `-inf` are as if absent: neither $V$ nor the sum has them. Where a
    label is nearly certain, $\log q_y$ and $1 - q_y$ are sums over the other columns,
    and keep their digits.

    It is the cross-entropy in `jaxkl.distillation_loss`, without a teacher, and has its
    precision, memory, second order and plain form, `jaxkl.reference.cross_entropy`. A
    head with its gradients costs three matrix products: the logits, `d hidden` and
    `d kernel`.

    Args:
      student: Logits $s$, `[..., vocab]`, or the head that makes them: a `LinearHead`
        or `FunctionHead`.
      labels: Integer classes, `[...]`. A token with a label of -100 does not count,
        neither in the loss nor in its mean, as in PyTorch.
      label_smoothing: $\epsilon$ in [0, 1]. A constant.
      z_loss: $z \ge 0$. A constant.
      where: Tokens that count, bool `[...]`. The others have no influence, even if
        their logits are NaN.
      weights: Weight $w$ of each token, float `[...]`. Differentiable.
      vocab_size: Number of columns that are vocabulary. The columns after them are
        padding, and their gradient is 0.
      reduction: `"none"`: $w \ell$ for each token; `"sum"`: $\sum w \ell$; `"mean"`:
        $\sum w \ell / \sum w$ over the tokens that count, and 0 without any weight.
      normalizer: Number that divides the sum in `"mean"`, in place of $\sum w$. A
        constant.
      axis_name: As in `jaxkl.distillation_loss`, like the following.
      mesh: The mesh of global arrays.
      token_axes: Mesh axis, or several, that spread the tokens.
      vocab_axis: Mesh axis that spreads the vocabulary.
      tile: Number of tokens to take at a time.
      plan: `"fast"`, `"lean"` or None.

    Returns:
      The loss, float64 if an argument is, else float32: `[...]` if `reduction="none"`,
      else a scalar. Gradients have their argument's dtype.

    Raises:
      TypeError: For an argument of a wrong type or dtype.
      ValueError: For shapes that do not fit, axes that are not in the mesh and, where
        they are known, values out of range. A traced label that is out of range makes
        the loss NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
      >>> print(f"{jaxkl.cross_entropy(logits, jnp.array([1, -100])):.4f}")
      0.2877

    References:
      Wijmans et al. [Cut Your Losses in Large-Vocabulary Language
      Models](https://arxiv.org/abs/2411.09009), 2024.
    """
    loss, _, _ = evaluate(prepare(LabelOptions(**locals())))  # see `options`
    return loss
