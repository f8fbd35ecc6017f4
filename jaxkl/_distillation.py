"""Distillation losses: the public functions."""

import inspect
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp

from ._arguments import IGNORED_LABEL
from ._divergences import Divergence
from ._engine import weighted_loss
from ._keywords import check_keywords
from ._metrics import DistillationMetrics
from ._numerics import zero_unless
from ._problem import prepare, Problem, Reduction
from ._sharding import check_layout, sharded_weighted_loss
from ._tile import weigh


class Options(TypedDict, total=False):
    """Keyword arguments of every distillation loss."""

    divergence: Divergence
    temperature: Any
    teacher_temperature: Any
    t_squared: bool
    labels: Any
    alpha: Any
    label_smoothing: Any
    z_loss: Any
    where: Any
    weights: Any
    vocab_size: int | None
    differentiate_teacher: bool
    reduction: Reduction
    normalizer: Any
    axis_name: str | None
    tile: int | None


def public_signature(f):
    """Shows the keyword arguments of `prepare`, with their defaults, as `f`'s."""
    own = inspect.signature(f).parameters
    parameters = inspect.signature(prepare).parameters
    hidden = {"statistics", "is_spread"} | ({"axis_name"} if "mesh" in own else set())
    merged = {k: p for k, p in own.items() if k != "options"}
    merged |= {k: p for k, p in parameters.items() if k not in merged}
    shown = [p for name, p in merged.items() if name not in hidden]
    f.__signature__ = inspect.Signature(shown)
    return f


def prepare_call(name, student, teacher, options, statistics=False) -> Problem:
    """`prepare`, for the function of that name."""
    check_keywords(name, options, Options.__annotations__)
    return prepare(student, teacher, statistics=statistics, **options)


@public_signature
def distillation_loss(student, teacher, **options: Unpack[Options]) -> jax.Array:
    r"""Loss of a student that learns from a teacher.

    With $p = \mathrm{softmax}(t / T_t)$, $q = \mathrm{softmax}(s / T)$ and $D$ the
    `divergence` of $q$ from $p$, a token's loss is

    $$ \ell = \alpha\,T^2 D + (1 - \alpha)\,\mathrm{CE} + z\,\mathrm{lse}(s)^2, $$

    where the cross-entropy to `labels`, CE, and the log-sum-exp, lse, are at
    temperature 1. For the default divergence, $D = \mathrm{KL}(p \,\|\, q)$ and
    $\partial D / \partial s = (q - p) / T$.

    Statistics are in float32 or more. Gradients are computed in the forward pass, a
    tile of tokens at a time, and no `[tokens, vocab]` array is held beside the
    arguments and their gradients. Second order (`jax.hessian`, reverse over reverse)
    works. For forward mode (`jax.jvp`, `jax.linearize`) there is
    `jaxkl.reference.distillation_loss`.

    Columns where both logits are `-inf` are as if absent. A token with $q = 0 < p$ has
    an infinite forward KL, and the formula's finite gradient.

    Args:
      student: Logits $s$, `[..., vocab]`, or a `LinearHead` that makes them. It comes
        first, where Keras and others have the teacher: values do not tell the two
        apart. Where just the teacher is differentiated there is a warning.
      teacher: Logits $t$, `[..., vocab]`, with the same leading shape, a `LinearHead`,
        or a `SparseTeacher`. A constant unless `differentiate_teacher`.
      divergence: $D$: one of the catalogue, or any hashable, elementwise callable
        `(log_p, log_q) -> f`, of which $D$ is the sum over the vocabulary.
      temperature: $T > 0$, a scalar or `[...]`. Differentiable. Here and below, what
        is out of range is an error, or a NaN loss where the values are traced.
      teacher_temperature: $T_t$, likewise; None: the same as `temperature`.
      t_squared: Whether to multiply $D$ by $T^2$, as Hinton et al. do, so that
        gradients keep their size when the temperature changes. TRL and Liger do not.
      labels: Integer classes, `[...]`; -100 leaves out the CE of a token, which still
        counts in the mean. They need `alpha`.
      alpha: $\alpha$ in [0, 1]. It has no default beside `labels`, and is 1 without
        them. A constant.
      label_smoothing: In [0, 1]: this share of each label is spread evenly over the
        vocabulary. A constant.
      z_loss: $z \ge 0$. A constant.
      where: Tokens that count, bool `[...]`. Others have no influence, even if their
        logits are NaN.
      weights: Weight $w$ of each token, float `[...]`. Differentiable.
      vocab_size: Number of columns that are vocabulary. Those from there on are
        padding, in either model, and their gradient is 0.
      differentiate_teacher: Whether the teacher's arrays get their gradient too, as in
        mutual learning, instead of 0.
      reduction: `"none"`: $w \ell$ for each token; `"sum"`: $\sum w \ell$; `"mean"`:
        $\sum w \ell / \sum w$, and 0 without any weight.
      normalizer: Divides the sum in place of $\sum w$ in `"mean"`: for example the
        number of tokens on all devices, or of all micro-batches. A constant.
      axis_name: Inside `jax.shard_map`, the mesh axis over which the vocabulary of both
        models is spread: logits, kernels and biases hold this device's columns, and all
        else is the same on the devices of the axis. So is the loss. Its mean is over
        this device's tokens; for `sharded_distillation_loss` it is over all.
      tile: Tokens to take at a time. None: chosen by device and vocabulary. (All at
        once if their number is symbolic, in `jax.export`.)

    Returns:
      The loss, float64 if an argument is, else float32: `[...]` if `reduction="none"`,
      else a scalar. Gradients have their argument's dtype.

    Raises:
      TypeError: For an argument of a wrong type or dtype.
      ValueError: For shapes that do not fit and, where known, values out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([0.0, jnp.log(3.0)])
      >>> print(f"{jaxkl.distillation_loss(student, teacher):.4f}")
      0.1308

    References:
      Hinton, Vinyals, Dean. [Distilling the Knowledge in a Neural
      Network](https://arxiv.org/abs/1503.02531), 2015.
    """
    problem = prepare_call("distillation_loss", student, teacher, options)
    loss, _, _ = weighted_loss(problem.spec, problem.operands)
    return loss if problem.spec.reduce else loss.reshape(problem.shape)


@public_signature
def distillation_loss_with_metrics(
    student, teacher, **options: Unpack[Options]
) -> tuple[jax.Array, DistillationMetrics]:
    """`distillation_loss`, and what one logs beside it, from the same pass.

    Args:
      student: See `distillation_loss`, as for every argument.
      teacher: Likewise.
      **options: Likewise. But `labels` may be for the metrics alone, without `alpha`,
        which then is 1.

    Returns:
      The loss, and `DistillationMetrics`: the form for
      `jax.value_and_grad(..., has_aux=True)`.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([0.0, jnp.log(3.0)])
      >>> loss, metrics = jaxkl.distillation_loss_with_metrics(student, teacher)
      >>> print(f"{metrics.student_entropy:.4f} {metrics.top1_agreement}")
      0.6931 0.0
    """
    name = "distillation_loss_with_metrics"
    problem = prepare_call(name, student, teacher, options, statistics=True)
    loss, terms, statistics = weighted_loss(problem.spec, problem.operands)
    loss = loss if problem.spec.reduce else loss.reshape(problem.shape)
    return loss, _metrics(problem, terms, statistics)


@public_signature
def sharded_distillation_loss(
    student, teacher, *, mesh, token_axes, vocab_axis=None, **options: Unpack[Options]
) -> jax.Array:
    """`distillation_loss` of global arrays that are spread over a mesh.

    Each device takes its tokens and its columns of the vocabulary, and no logits or
    heads are gathered: per tile of tokens, three small sums over the vocabulary's axis
    are exchanged, and per step the gradients, each once. The loss, and its mean, are
    of all tokens, and gradients are spread as their arguments are.

    Token counts and vocabularies that the mesh does not divide are padded; a head that
    it divides is not copied. Works under `jax.jit`, `jax.grad`, `jax.lax.scan` and
    `jax.checkpoint`, on one process or many.

    Args:
      student: See `distillation_loss`, as for all arguments that are not below.
      teacher: Likewise.
      mesh: The `jax.sharding.Mesh`.
      token_axes: Mesh axis, or several, that spread the first dimension of the tokens.
      vocab_axis: Mesh axis that spreads the vocabulary of both models; None: each
        device has all of it.
      **options: As in `distillation_loss`, without `axis_name`.

    Returns:
      The loss, as `distillation_loss` does, on all devices; if `reduction="none"`,
      spread as the tokens are.

    Raises:
      TypeError: For an argument of a wrong type or dtype.
      ValueError: For axes that are not in the mesh, and as `distillation_loss` does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> head = jaxkl.LinearHead(jnp.ones((1, 2)), jnp.array([[0.0, 0.0], [0.0, 1.0]]))
      >>> loss = jaxkl.sharded_distillation_loss(
      ...     jnp.zeros((1, 2)), head, mesh=mesh, token_axes="data", vocab_axis="model"
      ... )
      >>> print(f"{loss:.4f}")
      0.1109
    """
    layout = check_layout(mesh, token_axes, vocab_axis)
    name = "sharded_distillation_loss"
    problem = _prepare_global(name, student, teacher, layout, options)
    loss, _, _ = sharded_weighted_loss(problem.spec, layout, problem.operands)
    return loss if problem.spec.reduce else loss.reshape(problem.shape)


@public_signature
def sharded_distillation_loss_with_metrics(
    student, teacher, *, mesh, token_axes, vocab_axis=None, **options: Unpack[Options]
) -> tuple[jax.Array, DistillationMetrics]:
    """`sharded_distillation_loss`, and the metrics of all tokens from the same pass.

    Args:
      student: See `sharded_distillation_loss`, as for every argument.
      teacher: Likewise.
      mesh: Likewise.
      token_axes: Likewise.
      vocab_axis: Likewise.
      **options: Likewise.

    Returns:
      The loss, and `DistillationMetrics`, on all devices.
    """
    layout = check_layout(mesh, token_axes, vocab_axis)
    name = "sharded_distillation_loss_with_metrics"
    problem = _prepare_global(name, student, teacher, layout, options, statistics=True)
    outputs = sharded_weighted_loss(problem.spec, layout, problem.operands)
    loss, terms, statistics = outputs
    loss = loss if problem.spec.reduce else loss.reshape(problem.shape)
    return loss, _metrics(problem, terms, statistics)


def _prepare_global(name, student, teacher, layout, options, statistics=False):
    if options.get("axis_name") is not None:
        raise ValueError(
            "`axis_name` must be None with a mesh, whose axis is `vocab_axis`; got "
            f"{options['axis_name']!r}."
        )
    own = "mesh", "token_axes", "vocab_axis"
    check_keywords(name, options, [*own, *Options.__annotations__])
    more = dict(statistics=statistics, is_spread=layout.vocab_axis is not None)
    return prepare(student, teacher, **more, **options)


def _metrics(problem, terms, statistics) -> DistillationMetrics:
    weight = jax.lax.stop_gradient(problem.weight)

    def mean(x, weight=weight):
        total = jnp.sum(weight)
        return zero_unless(
            total != 0, jnp.sum(weigh(weight, x)) / jnp.where(total != 0, total, 1)
        )

    cross_entropy = None
    if terms.label is not None:
        cross_entropy = terms.label
        if terms.uniform is not None:
            smoothing = jnp.asarray(problem.label_smoothing, weight.dtype)
            cross_entropy = (1 - smoothing) * terms.label + weigh(
                smoothing, terms.uniform
            )
        labelled = zero_unless(problem.operands.labels != IGNORED_LABEL, weight)
        cross_entropy = mean(cross_entropy, labelled)
    return DistillationMetrics(
        divergence=mean(terms.divergence),
        kl=mean(statistics.kl),
        cross_entropy=cross_entropy,
        student_entropy=mean(statistics.student_entropy),
        teacher_entropy=mean(statistics.teacher_entropy),
        top1_agreement=mean(statistics.top1_agreement),
        weight=jnp.sum(weight),
    )
