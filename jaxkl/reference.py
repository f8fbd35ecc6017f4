"""The losses in plain JAX: no custom rule, no tiles.

The specification that one can read, and the versions for forward mode (`jax.jvp`,
`jax.linearize`), which a `custom_vjp` refuses.
"""

import functools as ft

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import xlogy
from jax.typing import ArrayLike

from ._api.cross_entropy import cross_entropy as fused_cross_entropy
from ._api.distillation import distillation_loss as fused_distillation_loss
from ._api.options import arguments_of, LabelOptions, LossOptions, TokenOptions
from ._api.prepare import prepare, Prepared
from ._api.token_log_probs import (
    log_probs_of,
    prepare_tokens,
    token_log_probs as fused_token_log_probs,
)
from ._divergence.catalogue import evaluate
from ._engine.comparison import Comparison
from ._engine.student_terms import Entropy, Label, LseSquared, Uniform
from ._math.numerics import zero_unless
from ._math.softmax import entropy, Outcomes
from ._math.vocabulary import Vocabulary
from ._source.lists import positions
from ._torch.conventions import (
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
    r"""`jaxkl.kl_div` in plain JAX: the same arguments, values and warnings.

    Plain autodiff gives the same gradients, in forward mode too, NaN for NaN, with two
    exceptions. A negative `target` has a NaN gradient even where the cotangent is 0
    (PyTorch: 0). The second derivative $1 / t$ of `target` is formed from $t^{-2}$, so
    in float32 it is lost below about 1e-19. Autodiff also keeps more residuals.

    Returns:
      The loss: a scalar, or of the broadcast shape for `"none"`.

    Example:
      At q = p, moving probability mass changes KL(p ‖ q) to second order only:

      >>> import jax, jax.numpy as jnp
      >>> loss = lambda q: kl_div(jnp.log(q), jnp.full(2, 0.5), reduction="sum")
      >>> value, slope = jax.jvp(loss, (jnp.full(2, 0.5),), (jnp.array([1.0, -1.0]),))
      >>> print(f"{value:.1f} {slope:.1f}")
      0.0 0.0
    """
    if size_average is None and reduce is None:
        over_elements = check_reduction(reduction)
    else:
        over_elements = legacy_reduction(size_average, reduce)
    input, target = check_arrays(input, target, log_target)
    log_q, t = promote(input, target)
    if log_target:
        loss = jnp.exp(t) * (t - log_q)
    else:
        loss = xlogy(t, t) - t * log_q
    loss = reduce_loss(loss, input, over_elements, reduction == "batchmean")
    return loss.astype(result_dtype(input, target))


@arguments_of(fused_distillation_loss, LossOptions)
def distillation_loss(options: LossOptions) -> Array:
    r"""`jaxkl.distillation_loss` in plain JAX: the same arguments and values.

    All logits are held at once. `tile` and `plan` are ignored, as is `mesh`: XLA
    spreads the program as it likes. With `axis_name`, each device gathers the logits of
    all.

    Forward mode works, and plain autodiff gives the same gradients. But a token of
    weight 0 that holds NaN makes them NaN (`where` does drop it).

    Returns:
      The loss: a scalar, or `[...]` for `reduction="none"`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> teacher = jnp.array([0.0, jnp.log(3.0)])
      >>> loss = lambda student: distillation_loss(student, teacher)
      >>> value, slope = jax.jvp(loss, (jnp.zeros(2),), (jnp.array([0.0, 1.0]),))
      >>> print(f"{value:.4f} {slope:.4f}")
      0.1308 -0.2500
    """
    return _loss(prepare(options))


@arguments_of(fused_cross_entropy, LabelOptions)
def cross_entropy(options: LabelOptions) -> Array:
    r"""`jaxkl.cross_entropy` in plain JAX: the same arguments and values.

    What is said of `distillation_loss` holds here too.
    """
    return _loss(prepare(options))


@arguments_of(fused_token_log_probs, TokenOptions)
def token_log_probs(options: TokenOptions) -> Array | tuple[Array, Array]:
    r"""`jaxkl.token_log_probs` in plain JAX: the same arguments and values.

    What is said of `distillation_loss` holds here too.
    """
    prepared, shape = prepare_tokens(options)
    return log_probs_of(prepared, shape, _weighted_terms(prepared))


def _loss(prepared: Prepared) -> Array:
    loss = ft.reduce(jnp.add, _weighted_terms(prepared))
    if not prepared.spec.reduce:
        return loss.reshape(prepared.batch_shape)
    return jnp.sum(loss) if prepared.factor is None else jnp.sum(loss) * prepared.factor


def _weighted_terms(prepared: Prepared) -> tuple[Array, ...]:
    """`weight · term` of each token."""
    spec, x = prepared.spec, prepared.operands
    if x.mask is not None:
        mask = x.mask
        x = x.map_sources(lambda source: source.mask_tokens(mask))
    s = _gathered(x.student.logits(spec.dtype, spec.vocab), spec.vocab)

    def value(term):
        if isinstance(term, Comparison):
            return _comparison(spec, x, term, s)
        return _student_term(term, s if term.at_1 else _over(s, x.student_temperature))

    return tuple(term.weight * value(term) for term in x.terms)


def _student_term(term, logits):
    log_q = jax.nn.log_softmax(logits, axis=-1)
    match term:
        case Label():  # and Labels
            return _label_term(log_q, term.labels)
        case Uniform():
            present = logits != -jnp.inf
            total = -jnp.sum(zero_unless(present, log_q), axis=-1)
            count = jnp.sum(present, axis=-1, dtype=log_q.dtype)
            return total / jnp.maximum(count, 1)
        case LseSquared():
            return jax.nn.logsumexp(logits, axis=-1) ** 2
        case Entropy():
            return entropy(Outcomes.of_log(log_q))
    raise NotImplementedError(term)


def _comparison(spec, x, term, s):
    log_q = jax.nn.log_softmax(_over(s, x.student_temperature), axis=-1)
    divergence, teacher = term.whole_divergence, term.teacher
    if teacher.kind == "list":
        vocab = Vocabulary.whole(spec.vocab.size)
        teacher = teacher.ready(spec.dtype, vocab)
        if not term.has_columns:
            return _list_divergence(divergence, teacher, log_q, vocab)
        t = teacher.logits(spec.dtype, vocab)
    else:
        t = _gathered(teacher.logits(spec.dtype, spec.vocab), spec.vocab)
    log_p = jax.nn.log_softmax(_over(t, x.temperatures["teacher"]), axis=-1)
    return _divergence(divergence, log_p, log_q)


def _divergence(divergence, log_p, log_q):
    p, q = Outcomes.of_log(log_p), Outcomes.of_log(log_q)
    return jnp.sum(evaluate(divergence, p, q), axis=-1)


def _list_divergence(divergence, teacher, log_q, vocab):
    """That of the listed columns, and of the others as one outcome more."""
    at = positions(teacher.columns, vocab)
    listed = log_q.at[at].get(mode="fill", fill_value=-jnp.inf)
    log_p = teacher.log_probs
    if teacher.tail == "drop":
        p = jnp.exp(log_p)
        return jnp.sum(p * zero_unless(p > 0, log_p - listed), axis=-1)
    if teacher.tail == "conditional":
        log_q = jax.nn.log_softmax(listed, axis=-1)
    else:
        others = log_q.at[at].set(-jnp.inf, mode="drop")
        is_any = jnp.any(others > -jnp.inf, axis=-1, keepdims=True)
        rest = jax.nn.logsumexp(jnp.where(is_any, others, 0), axis=-1, keepdims=True)
        rest = jnp.where(is_any, rest, -jnp.inf)
        log_q = jnp.concatenate([listed, rest], axis=-1)
        log_p = jnp.concatenate([log_p, teacher.log_rest], axis=-1)
    return _divergence(divergence, jax.nn.log_softmax(log_p, axis=-1), log_q)


def _label_term(log_q, labels):
    """`-log q` of the labels, `[B]` or `[B, k]`; 0 where there is none."""
    if labels.ndim == 1:
        columns = jnp.arange(log_q.shape[-1], dtype=labels.dtype)
        is_label = columns[None, :] == labels[:, None]
        return -jnp.sum(zero_unless(is_label, log_q), axis=-1)
    # One that is out of range has the weight NaN, or 0 where its token does not count.
    columns = jnp.clip(labels, 0, log_q.shape[-1] - 1)
    listed = jnp.take_along_axis(log_q, columns, axis=-1)
    return -zero_unless(labels >= 0, listed)


def _gathered(logits, vocab):
    """The slices of all devices side by side."""
    if vocab.axis_name is None:
        return logits
    everywhere = jnp.zeros((logits.shape[0], vocab.width * vocab.shards), logits.dtype)
    index = (0, vocab.start)
    placed = jax.lax.dynamic_update_slice(everywhere, logits, index)
    (full,) = vocab.psum(placed)
    return full[:, : vocab.size]


def _over(logits, temperature):
    if temperature is None:
        return logits
    # Mask the operand: the derivative of a quotient of -inf is NaN.
    finite = logits > -jnp.inf
    return jnp.where(finite, zero_unless(finite, logits) / temperature[:, None], logits)
