"""KL losses in optax's conventions: summed over `axis`, unreduced over the batch.

The first three are drop-ins for the functions of the same name in `optax.losses`. They
take what optax takes and return what optax returns, except where optax returns NaN:
`0 log 0` is 0 here, in value and gradient. And losses are at least float32: half
precision is converted before the logarithm, not rounded after every operation.

The softmax forms start from logits. They are `jaxkl.distillation_loss` with any class
axis, class masks and a differentiable teacher.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._api.distillation import distillation_loss
from ._divergence.catalogue import Divergence, ForwardKL
from ._math.elementwise import (
    Axis,
    broadcast,
    elementwise,
    GENERALIZED_KL,
    KL,
    KL_LOG_TARGETS,
)
from ._math.numerics import loss_dtype


def kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""KL divergence $\mathrm{KL}(t \,\|\, q)$ of predictions $q$ from targets $t$.

    With $\log q$ = `log_predictions` and $t$ = `targets`, taken as given,

    $$ \ell = \sum_v t_v \, (\log t_v - \log q_v), \qquad
       \partial \ell / \partial \log q_v = -t_v, \qquad
       \partial \ell / \partial t_v = \log t_v + 1 - \log q_v. $$

    - Where $t_v = 0$ the term is 0, also if $\log q_v$ is `-inf`, and so is its
      gradient with respect to $t_v$. The latter is a convention, as the true slope
      tends to $-\infty$: a zero target is left alone.
    - Where $q_v = 0 < t_v$ the value is `inf` and the gradient $-t_v$ is finite.
    - Nothing is normalised: where the predictions sum to more than the targets, the
      loss can be negative. So the sum is the plain one above, rounded at the size of
      its terms. For nearly equal distributions `generalized_kl_divergence` is accurate,
      and so is `softmax_kl_divergence`, which starts from logits.
    - NaN in either input is passed on. Forward mode and second order work.

    Args:
      log_predictions: Logarithms of the predicted probabilities, `[..., vocab]`.
      targets: Target probabilities, nonnegative, of a shape that broadcasts with it.
      axis: Axis or axes to sum over. All of them if None.
      where: Elements to include: bool, broadcast to the shape of the inputs. The others
        add exactly 0 to value and gradients, even if they hold NaN or inf.

    Returns:
      The loss, `[...]`: float64 if an input is float64, else float32. Gradients have
      the dtype of their own input.

    Raises:
      TypeError: If an input is not floating point, `where` not bool, `axis` not int.
      ValueError: If shapes do not broadcast, or `axis` is out of bounds or repeated.

    Example:
      >>> import jax.numpy as jnp
      >>> log_predictions = jnp.log(jnp.array([0.25, 0.75]))
      >>> loss = kl_divergence(log_predictions, jnp.array([0.5, 0.5]))
      >>> print(f"{loss:.4f}")  # log(2) / 2 + log(2/3) / 2
      0.1438
      >>> loss = kl_divergence(log_predictions, jnp.array([1.0, 0.0]))
      >>> print(f"{loss:.4f}")  # log(4)
      1.3863

    References:
      Kullback and Leibler. [On Information and
      Sufficiency](https://www.jstor.org/stable/2236703), 1951.

      DeepMind. [optax.losses.kl_divergence](https://optax.readthedocs.io/en/latest/api/losses.html).
    """
    args = {"log_predictions": log_predictions, "targets": targets}
    return elementwise(KL, args, axis, where)


def kl_divergence_with_log_targets(
    log_predictions: ArrayLike,
    log_targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""KL divergence $\mathrm{KL}(t \,\|\, q)$, of targets given as logarithms.

    With $\log q$ = `log_predictions` and $\log t$ = `log_targets`, taken as given,

    $$ \ell = \sum_v t_v \, (\log t_v - \log q_v), \qquad
       \partial \ell / \partial \log q_v = -t_v, \qquad
       \partial \ell / \partial \log t_v = t_v \, (\log t_v + 1 - \log q_v). $$

    Where $t_v = 0$, that is `log_targets` is `-inf` or its exponential underflows, term
    and gradients are 0, which is their limit, also if $\log q_v$ is `-inf`. Otherwise
    as `kl_divergence`.

    Args:
      log_predictions: Logarithms of the predicted probabilities, `[..., vocab]`.
      log_targets: Logarithms of the target probabilities, of a shape that broadcasts
        with it.
      axis: Axis or axes to sum over. All of them if None.
      where: Elements to include: bool, broadcast to the shape of the inputs. The others
        add exactly 0 to value and gradients, even if they hold NaN or inf.

    Returns:
      The loss, `[...]`: float64 if an input is float64, else float32. Gradients have
      the dtype of their own input.

    Raises:
      TypeError: If an input is not floating point, `where` not bool, `axis` not int.
      ValueError: If shapes do not broadcast, or `axis` is out of bounds or repeated.

    Example:
      >>> import jax.numpy as jnp
      >>> log_predictions = jnp.log(jnp.array([0.25, 0.75]))
      >>> log_targets = jnp.array([0.0, -jnp.inf])
      >>> loss = kl_divergence_with_log_targets(log_predictions, log_targets)
      >>> print(f"{loss:.4f}")  # log(4)
      1.3863

    References:
      Kullback and Leibler. [On Information and
      Sufficiency](https://www.jstor.org/stable/2236703), 1951.

      DeepMind. [optax.losses.kl_divergence_with_log_targets](https://optax.readthedocs.io/en/latest/api/losses.html).
    """
    args = {"log_predictions": log_predictions, "log_targets": log_targets}
    return elementwise(KL_LOG_TARGETS, args, axis, where)


def generalized_kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""KL divergence of unnormalised predictions $q$ from unnormalised targets $t$.

    The Bregman divergence of $x \log x - x$. With $\log q$ = `log_predictions` and
    $t$ = `targets`,

    $$ \ell = \sum_v t_v \, (\log t_v - \log q_v) - t_v + q_v, \qquad
       \partial \ell / \partial \log q_v = q_v - t_v, \qquad
       \partial \ell / \partial t_v = \log t_v - \log q_v. $$

    Every term is nonnegative, and is evaluated as $t_v \, (e^r - 1 - r)$ with
    $r = \log q_v - \log t_v$, without cancellation: the loss is never below 0, and
    accurate however close $q$ and $t$ are. If both sum to one it is the KL divergence.

    Where $t_v = 0$ the term is $q_v$. Its gradient with respect to $t_v$ is 0 there, a
    convention, as the true slope tends to $-\infty$. Otherwise as `kl_divergence`.

    Args:
      log_predictions: Logarithms of the predictions, `[..., vocab]`.
      targets: Targets, nonnegative, of a shape that broadcasts with it.
      axis: Axis or axes to sum over. All of them if None.
      where: Elements to include: bool, broadcast to the shape of the inputs. The others
        add exactly 0 to value and gradients, even if they hold NaN or inf.

    Returns:
      The loss, `[...]`: float64 if an input is float64, else float32. Gradients have
      the dtype of their own input.

    Raises:
      TypeError: If an input is not floating point, `where` not bool, `axis` not int.
      ValueError: If shapes do not broadcast, or `axis` is out of bounds or repeated.

    Example:
      >>> import jax.numpy as jnp
      >>> log_predictions = jnp.log(jnp.array([1.0, 3.0]))
      >>> loss = generalized_kl_divergence(log_predictions, jnp.array([2.0, 0.0]))
      >>> print(f"{loss:.4f}")  # (2 log(2) - 2 + 1) + 3
      3.3863

    References:
      Bregman. [The relaxation method of finding the common point of convex
      sets](https://doi.org/10.1016/0041-5553(67)90040-7), 1967.

      DeepMind. [optax.losses.generalized_kl_divergence](https://optax.readthedocs.io/en/latest/api/losses.html).
    """
    args = {"log_predictions": log_predictions, "targets": targets}
    return elementwise(GENERALIZED_KL, args, axis, where)


def softmax_kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> jax.Array:
    r"""Forward KL divergence $\mathrm{KL}(p \,\|\, q)$, from logits.

    The student is $q = \mathrm{softmax}(s / T)$ and the teacher
    $p = \mathrm{softmax}(t / T)$, over `axis`:

    $$ \ell = \sum_v p_v \, (\log p_v - \log q_v), \qquad
       \partial \ell / \partial s_v = (q_v - p_v) / T, \qquad
       \partial \ell / \partial t_v = p_v \, (\log p_v - \log q_v - \ell) / T. $$

    The factor $T^2$ of Hinton et al. is *not* applied. The teacher is differentiated:
    wrap a constant one in `jax.lax.stop_gradient`. Otherwise this is
    `softmax_divergence` with `jaxkl.ForwardKL()`; the notes there hold.

    Args:
      student_logits: Unnormalised log-probabilities $s$, `[..., vocab]`.
      teacher_logits: Unnormalised log-probabilities $t$, of a batch shape that
        broadcasts with it.
      axis: Axis or axes of the classes. All of them if None.
      where: Classes to include: bool, broadcast to the shape of the logits.
      temperature: $T$ in $[2^{-20}, 2^{20}]$, a scalar or of the loss's shape.
        Differentiable.

    Returns:
      The loss, `[...]`: float64 if an input is float64, else float32. Gradients have
      the dtype of their own input.

    Raises:
      TypeError: If an input is not floating point, `where` not bool, `axis` not int.
      ValueError: If shapes do not fit, `axis` is out of bounds or repeated, or
        `temperature` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([0.0, jnp.log(3.0)])
      >>> loss = softmax_kl_divergence(student, teacher)
      >>> print(f"{loss:.4f}")  # log(1/2) / 4 + 3/4 log(3/2)
      0.1308

    References:
      Hinton, Vinyals, Dean. [Distilling the Knowledge in a Neural
      Network](https://arxiv.org/abs/1503.02531), 2015.

      Kullback and Leibler. [On Information and
      Sufficiency](https://www.jstor.org/stable/2236703), 1951.
    """
    return softmax_divergence(
        student_logits,
        teacher_logits,
        ForwardKL(),
        axis,
        where,
        temperature=temperature,
    )


def softmax_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    divergence: Divergence,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> jax.Array:
    r"""Divergence $\sum_v f(\log p_v, \log q_v)$ of student $q$ from teacher $p$.

    The student is $q = \mathrm{softmax}(s / T)$ and the teacher
    $p = \mathrm{softmax}(t / T)$, over `axis`. The factor $T^2$ of Hinton et al. is
    *not* applied. Gradients to both logits and to $T$ are true: wrap a constant teacher
    in `jax.lax.stop_gradient`.

    - `where` removes classes as if they were sliced away, from the softmax too,
      whatever they hold: their gradients are exactly 0. With no class left the loss is
      0. To drop whole rows, pass a mask that is constant along `axis`.
    - A `-inf` logit is a class of probability 0.
    - Second order works; there is no forward mode (`jax.jvp`), as it has a custom
      reverse rule. `jaxkl.reference.distillation_loss` has one.

    Args:
      student_logits: Unnormalised log-probabilities $s$, `[..., vocab]`.
      teacher_logits: Unnormalised log-probabilities $t$, of a batch shape that
        broadcasts with it.
      divergence: One of jaxkl's, such as `jaxkl.ReverseKL()`, whose parameters may be
        arrays, scalars or of the loss's shape (see `jaxkl.Mixture`), or any elementwise
        function $f$ of two arrays, $\log p$ of the teacher first. It sees no class
        that `where` removes.
      axis: Axis or axes of the classes. All of them if None.
      where: Classes to include: bool, broadcast to the shape of the logits.
      temperature: $T$ in $[2^{-20}, 2^{20}]$, a scalar or of the loss's shape.
        Differentiable.

    Returns:
      The loss, `[...]`: float64 if an input is float64, else float32. Gradients have
      the dtype of their own input.

    Raises:
      TypeError: If an input is not floating point, `where` not bool, `axis` not int, or
        `divergence` not callable or hashable.
      ValueError: If shapes do not fit, `axis` is out of bounds or repeated,
        `temperature` is out of range, or `divergence` is not elementwise.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([0.0, jnp.log(3.0)])
      >>> squares = lambda log_p, log_q: (jnp.exp(log_p) - jnp.exp(log_q)) ** 2
      >>> loss = softmax_divergence(student, teacher, squares)
      >>> print(f"{loss:.4f}")  # (1/4 - 1/2)² + (3/4 - 1/2)²
      0.1250
    """
    args = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    arrays, shape, axes, where = broadcast(args, axis, where)
    for name, x in zip(args, arrays, strict=True):
        padded = (1,) * (len(shape) - x.ndim) + x.shape
        if any(padded[i] != shape[i] for i in axes):
            msg = f"`{name}` must have every class along `axis` {axis}, those of shape "
            raise ValueError(f"{msg}{shape}, got {x.shape}.")
    dtype = loss_dtype(*arrays)
    rest = tuple(i for i in range(len(shape)) if i not in axes)
    batch = tuple(shape[i] for i in rest)
    vocab = math.prod(shape[i] for i in axes)
    if not isinstance(vocab, int):
        raise ValueError(
            f"`student_logits` must have classes of known number, got {vocab}: only "
            "the batch may be symbolic."
        )
    if vocab == 0:
        return jnp.zeros(batch, dtype)

    def rows(x):
        return jnp.transpose(x, rest + axes).reshape(*batch, vocab)

    # Convert before broadcasting, as `elementwise` does.
    student, teacher = (
        rows(x if x.shape == shape else jnp.broadcast_to(x.astype(dtype), shape))
        for x in arrays
    )
    if where is not None:
        where = rows(jnp.broadcast_to(where, shape))
        student = jnp.where(where, student, -jnp.inf)
        teacher = jnp.where(where, teacher, -jnp.inf)
        where = jnp.any(where, axis=-1)
    return distillation_loss(
        student,
        teacher,
        divergence=divergence,
        temperature=temperature,
        t_squared=False,
        where=where,
        differentiate_teacher=True,
        reduction="none",
    )
