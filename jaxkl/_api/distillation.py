"""Distillation losses: the public functions."""

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from .._divergence.catalogue import Divergence, ForwardKL
from .._engine.sharding import evaluate
from .._source.function_head import FunctionHead
from .._source.linear_head import LinearHead
from .._source.sparse_teacher import SparseTeacher
from .._util import checks as check
from .metrics import DistillationMetrics, metrics_of
from .options import LossOptions, MetricsOptions, PlanName, Reduction, suggest_keywords
from .prepare import prepare


@suggest_keywords
def distillation_loss(
    student: ArrayLike | LinearHead | FunctionHead,
    teacher: ArrayLike | LinearHead | FunctionHead | SparseTeacher,
    *,
    divergence: Divergence = ForwardKL(),
    temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike | None = None,
    t_squared: bool = True,
    labels: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    vocab_size: int | None = None,
    differentiate_teacher: bool = False,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    token_axes: str | Sequence[str] | None = None,
    vocab_axis: str | None = None,
    tile: int | None = None,
    plan: PlanName | None = None,
) -> jax.Array:
    r"""Loss of a student that learns from a teacher.

    With $p = \mathrm{softmax}(t / T_t)$, $q = \mathrm{softmax}(s / T)$ and $D$ the
    `divergence` of $q$ from $p$, a token's loss is

    $$ \ell = \alpha\,T^2 D + (1 - \alpha)\,\mathrm{CE} + z\,\mathrm{lse}(s)^2, $$

    where the cross-entropy to `labels`, CE, and the log-sum-exp, lse, are at
    temperature 1. For the default divergence, $D = \mathrm{KL}(p \,\|\, q)$ and
    $\partial D / \partial s = (q - p) / T$.

    Statistics are in float32 or more. Gradients are computed in the forward pass, a
    tile of tokens at a time, or in the backward pass with `reduction="none"` and in
    float16. No `[tokens, vocab]` array is held beside the arguments and their
    gradients. Second order (`jax.hessian`, reverse over reverse) works. For forward
    mode (`jax.jvp`, `jax.linearize`) there is `jaxkl.reference.distillation_loss`.

    Columns where both logits are `-inf` are as if absent. A token with $q = 0 < p$ has
    an infinite forward KL, and the finite gradient of the formula. On a mesh, a head
    that the mesh divides is not copied. The devices of the vocabulary's axis exchange
    three small reductions for each tile of tokens, and each gradient once.

    Args:
      student: Logits $s$, `[..., vocab]`, or a `LinearHead` or `FunctionHead` that
        makes them. It comes first; Keras and others have the teacher first, and values
        do not tell the two apart. There is a warning if only the teacher is
        differentiated.
      teacher: Logits $t$, `[..., vocab]`, with the same leading shape, a head, or a
        `SparseTeacher`. A constant unless `differentiate_teacher`.
      divergence: $D$: one of the catalogue, or any hashable, elementwise callable
        `(log_p, log_q) -> f`, of which $D$ is the sum over the vocabulary. Parameters
        of the catalogue's may be arrays, scalars or `[...]`: see `Mixture`. They are
        constants.
      temperature: $T$ in $[2^{-20}, 2^{20}]$, about 1e-6 to 1e6: a scalar or `[...]`.
        Differentiable. Here and below, a value out of range is an error; if it is
        traced, the loss is NaN.
      teacher_temperature: $T_t$, likewise. None: the same as `temperature`. Beside a
        `SparseTeacher` that knows its temperature, it must be that one.
      t_squared: Whether to multiply $D$ by $T^2$, as Hinton et al. do, so that
        gradients keep their size when the temperature changes. TRL and Liger do not.
      labels: Integer classes, `[...]`. A label of -100 leaves out the CE of its token,
        which still counts in the mean. Labels need an `alpha`.
      alpha: $\alpha$ in [0, 1]. It must be given with `labels`, and is 1 without them.
        A constant.
      label_smoothing: The share of each label, in [0, 1], that is spread evenly over
        the columns that are not `-inf`. A constant.
      z_loss: $z \ge 0$. A constant.
      where: Tokens that count, bool `[...]`. The others have no influence, even if
        their logits are NaN.
      weights: Weight $w$ of each token, float `[...]`. Differentiable.
      vocab_size: Number of columns that are vocabulary. The columns after them are
        padding, in either model, and their gradient is 0.
      differentiate_teacher: Whether the teacher's arrays get their gradient too, as in
        mutual learning. Otherwise it is 0.
      reduction: `"none"`: $w \ell$ for each token; `"sum"`: $\sum w \ell$; `"mean"`:
        $\sum w \ell / \sum w$, and 0 without any weight.
      normalizer: Number that divides the sum in `"mean"`, in place of $\sum w$: for
        example the number of tokens on all devices, or of all micro-batches. A
        constant.
      mesh: A `jax.sharding.Mesh` on which the arguments, which are global arrays, are
        spread. Each device takes its tokens and its columns of the vocabulary; no
        logits or heads are gathered. The loss and its mean are of all tokens, and
        gradients are spread as their arguments are. Token counts and vocabularies that
        the mesh does not divide are padded.
      token_axes: Mesh axis, or several, that spread the first dimension of the tokens.
        None: each device has all tokens.
      vocab_axis: Mesh axis that spreads the vocabulary of both models. None: each
        device has all of it. If a model is a `FunctionHead` without `param_specs`, its
        devices split the tokens instead.
      axis_name: Instead of a mesh, inside your own `jax.shard_map`: the mesh axis over
        which the vocabulary of both models is spread. Logits, kernels and biases hold
        this device's columns; everything else, and the loss, is the same on all devices
        of the axis. The mean is over this device's tokens.
      tile: Number of tokens to take at a time; it changes memory and time, not the
        result. None: chosen by device and vocabulary. (All tokens at once if their
        number is symbolic, in `jax.export`, or mesh axes are Explicit.)
      plan: How heads are walked; it changes memory and time, not the result. `"fast"`:
        tiles of tokens. `"lean"`: all tokens at once and a block of the vocabulary at a
        time. It makes all logits twice (three times if the divergence is neither
        `ForwardKL`, `ReverseKL`, `SymmetricKL` nor a `Mixture` of these), holds nothing
        as large as a head or as logits, and takes no `tile`. Logits without a head are
        in memory already, and have one plan, and a `FunctionHead` has the fast one.
        None: the fast one, or on an accelerator the lean one where the fast one would
        hold more than 4 GiB.

    Returns:
      The loss, float64 if an argument is, else float32: `[...]` if `reduction="none"`,
      else a scalar. Gradients have their argument's dtype. On a mesh, a scalar is on
      all devices, and `[...]` is spread as the tokens are.

    Raises:
      TypeError: For an argument of a wrong type or dtype.
      ValueError: For shapes that do not fit, axes that are not in the mesh and, where
        they are known, values out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([0.0, jnp.log(3.0)])
      >>> print(f"{jaxkl.distillation_loss(student, teacher):.4f}")
      0.1308

      On a mesh, here of one device:

      >>> import jax
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> axes = dict(mesh=mesh, token_axes="data", vocab_axis="model")
      >>> head = jaxkl.LinearHead(jnp.ones((1, 2)), jnp.array([[0.0, 0.0], [0.0, 1.0]]))
      >>> print(f"{jaxkl.distillation_loss(jnp.zeros((1, 2)), head, **axes):.4f}")
      0.1109

    References:
      Hinton, Vinyals, Dean. [Distilling the Knowledge in a Neural
      Network](https://arxiv.org/abs/1503.02531), 2015.
    """
    loss, _, _ = evaluate(prepare(LossOptions(**locals())))  # see `options`
    return loss


@suggest_keywords
def distillation_loss_with_metrics(
    student: ArrayLike | LinearHead | FunctionHead,
    teacher: ArrayLike | LinearHead | FunctionHead | SparseTeacher,
    *,
    divergence: Divergence = ForwardKL(),
    temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike | None = None,
    t_squared: bool = True,
    labels: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    vocab_size: int | None = None,
    differentiate_teacher: bool = False,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    token_axes: str | Sequence[str] | None = None,
    vocab_axis: str | None = None,
    tile: int | None = None,
    plan: PlanName | None = None,
    per_token_metrics: bool = False,
) -> tuple[jax.Array, DistillationMetrics]:
    """`distillation_loss`, and what one logs beside it, from the same pass.

    The arguments are those of `distillation_loss`, with one difference: `labels` may be
    for the metrics alone. Without an `alpha`, which then is 1, they have no part in the
    loss.

    With `mesh`, the metrics are of all tokens. With `axis_name`, they are of this
    device's tokens, like the loss, and the same on all devices of that axis: sum them
    over the axes that spread the tokens alone, as `jax.lax.psum(metrics, "data")`.

    Beside a `SparseTeacher`, the metrics are of the outcomes that the loss compares, at
    its temperatures. With `k` slots, `top_k_overlap` costs a pass over a tile's
    logits for each bit of `k`, and with the lean plan one for each slot.

    Args:
      per_token_metrics: Whether the metrics are those of each token, `[...]`, whatever
        `reduction` is. Those of a token without weight are 0.

    Returns:
      The loss, and `DistillationMetrics`, scalars or `[...]`: the form for
      `jax.value_and_grad(..., has_aux=True)`.

    Raises:
      TypeError: As `distillation_loss`, and if `per_token_metrics` is not a bool.
      ValueError: As `distillation_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([0.0, jnp.log(3.0)])
      >>> loss, metrics = jaxkl.distillation_loss_with_metrics(student, teacher)
      >>> print(f"{metrics.student_entropy:.4f} {metrics.top1_agreement}")
      0.6931 0.0
    """
    options = MetricsOptions(**locals())  # see `options`
    per_token = check.boolean("per_token_metrics", options.per_token_metrics)
    prepared = prepare(options, metrics=True)
    loss, terms, (values,) = evaluate(prepared)
    return loss, metrics_of(prepared, terms, values, per_token=per_token)
