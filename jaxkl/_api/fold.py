"""The terms of a loss with their weights, of its checked arguments.

All that reduces, masks or mixes is folded into one weight per token and term. Autodiff
does the rest: the gradients of weights, T² and the normaliser are those of the few
lines in `_term_weights`.
"""

import functools as ft
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._divergence.catalogue import Divergence
from .._divergence.parameters import as_operand, Interval, Parameter
from .._engine.comparison import Comparison, DenseComparison
from .._engine.list_comparison import ListComparison
from .._engine.student_terms import Label, LseSquared, StudentTerm, Uniform
from .._math.numerics import zero_unless
from .._source.base import Source
from .._source.sparse_teacher import ListSource
from .arguments import IGNORED_LABEL, per_token


class Arguments(NamedTuple):
    """What the weights of a loss are made of: checked, but not yet arrays of tokens."""

    weights: jax.Array | None  # [...]
    mask: jax.Array | None  # [B], like the labels
    labels: jax.Array | None
    temperature: Any  # a number, an array that is a scalar or [...], or None for 1
    teacher_temperature: Any
    normalizer: Any
    alpha: Any
    label_smoothing: Any
    z_loss: Any
    parameters: tuple[jax.Array, ...]  # of the divergence


class Folding(NamedTuple):
    """The static part of how weights are made of `Arguments`."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    vocab_size: int
    mean: bool  # whether a sum over tokens is divided by a total
    t_squared: bool
    has_divergence: bool
    has_label: bool
    has_uniform: bool
    has_lse: bool
    are_known: bool  # whether all that mixes terms is in range
    intervals: tuple[Interval, ...]  # of the parameters


class Weights(NamedTuple):
    """Of the terms of a loss, `[B]` each; None: it has no such term."""

    divergence: jax.Array | None
    label: jax.Array | None
    uniform: jax.Array | None
    lse_squared: jax.Array | None


class Folded(NamedTuple):
    """Of each token, `[B]`, but for the factor."""

    weight: jax.Array
    term_weights: Weights
    temperature: jax.Array | None
    teacher_temperature: jax.Array | None
    parameters: tuple[jax.Array, ...]
    factor: jax.Array | None  # of the loss, see `_one_over`; None: 1
    weightless: jax.Array  # whether no term has a weight
    dropped: jax.Array  # and none whatever `weights` are, as by a label of -100


@ft.partial(jax.jit, static_argnums=0, inline=True)
def fold(how: Folding, x: Arguments) -> Folded:
    """All that comes before the engine, in one program."""
    mask, labels = x.mask, x.labels
    of_token = lambda value: per_token(value, how.shape, how.dtype)
    weight = of_token(1.0 if x.weights is None else x.weights)
    assert weight is not None
    temperatures = of_token(x.temperature), of_token(x.teacher_temperature)
    if mask is not None:
        weight = zero_unless(mask, weight)
        # The temperature of a token that does not count may be NaN.
        temperatures = jax.tree.map(lambda T: jnp.where(mask, T, 1), temperatures)
    counted = weight
    if not how.has_divergence:
        assert labels is not None
        counted = zero_unless(labels != IGNORED_LABEL, weight)
    total = factor = None
    if how.mean:
        total = jnp.sum(counted)
        if x.normalizer is not None:
            total = jnp.asarray(x.normalizer, how.dtype)
        elif x.weights is not None:
            factor = _one_over(jnp.where(total != 0, total, 1))
    T = temperatures[0] if how.t_squared else None
    term_weights = _term_weights(how, x, _normalized(counted, total), T)
    if mask is not None:
        term_weights = jax.tree.map(lambda w: zero_unless(mask, w), term_weights)
    weightless = ft.reduce(
        operator.and_, (w == 0 for w in jax.tree.leaves(term_weights))
    )
    parameters = zip(x.parameters, how.intervals, strict=True)
    return Folded(
        weight=counted,
        term_weights=term_weights,
        temperature=temperatures[0],
        teacher_temperature=temperatures[1],
        parameters=tuple(
            as_operand(value, interval, how.shape, how.dtype, mask)
            for value, interval in parameters
        ),
        factor=factor,
        weightless=weightless,
        dropped=weightless & (weight != 0),
    )


def _term_weights(
    how: Folding, x: Arguments, weight: jax.Array, temperature: jax.Array | None
) -> Weights:
    """`weight · (α T² D + (1-α) CE + z_loss lse²)`, as a weight for each term.

    `temperature` is None if there is no factor T².
    """
    alpha, smoothing, z_weight = (
        jax.lax.stop_gradient(jnp.asarray(value, weight.dtype))
        for value in (x.alpha, x.label_smoothing, x.z_loss)
    )
    if not how.are_known:
        # A number that is out of range is NaN. It makes the loss NaN, also where its
        # own term has no part in it.
        weight = jnp.where(jnp.isnan(alpha + smoothing + z_weight), jnp.nan, weight)
    divergence = label = uniform = lse_squared = None
    if how.has_divergence:
        divergence = _times(weight, alpha)
        if temperature is not None:
            # A token without weight may hold NaN, and its divergence must not enter
            # the gradient of its temperature.
            squared = temperature * temperature
            finite = zero_unless(jnp.isfinite(squared), squared)
            constant = jax.lax.stop_gradient(finite)
            divergence *= jnp.where(weight != 0, squared, constant)
    if how.has_label:
        assert x.labels is not None
        is_ignored = x.labels == IGNORED_LABEL
        valid = (x.labels >= 0) & (x.labels < how.vocab_size)
        label = zero_unless(~is_ignored, _times(weight, 1 - alpha))
        # Under `jit` a label that is out of range cannot raise: it makes the loss NaN.
        label = jnp.where(valid | is_ignored, label, jnp.nan)
        if how.has_uniform:
            label, uniform = _times(label, 1 - smoothing), _times(label, smoothing)
    if how.has_lse:
        lse_squared = _times(weight, z_weight)
    return Weights(divergence, label, uniform, lse_squared)


def _times(weight: jax.Array, factor: jax.Array) -> jax.Array:
    """The product. A factor of 0 leaves a term out, even where the term is infinite:
    then its gradient, which is that of the weight, is 0 too."""
    return zero_unless(factor != 0, weight * factor)


def _normalized(weight: jax.Array, total: jax.Array | None) -> jax.Array:
    """`weight / total`, in which the total is a constant: see `_one_over`."""
    if total is None:
        return weight
    total = jax.lax.stop_gradient(total)
    # If there is no weight at all, the loss is 0 and has no gradient.
    return zero_unless(total != 0, weight / jnp.where(total != 0, total, 1))


@jax.custom_jvp
def _one_over(total: jax.Array) -> jax.Array:
    """1, which has the derivatives of a constant, the total's value, over the total.

    The loss is multiplied by it, and so a mean has its gradient by the total. In the
    quotients of weights that gradient would be a sum over tokens, where 0 · NaN is NaN
    if the loss of a token without weight is.
    """
    return jnp.ones_like(total)


@_one_over.defjvp
def _one_over_jvp(primals, tangents):
    one = _one_over(*primals)
    return one, -one * tangents[0] / primals[0]


def student_terms(folded: Folded, labels: Any, *, at_1: bool) -> list[StudentTerm]:
    """Those of the student alone: at temperature 1, or at that of the loss."""
    weights = folded.term_weights
    terms: list[StudentTerm] = []
    if weights.label is not None:
        terms.append(Label(weights.label, labels, at_1=at_1))
    if weights.uniform is not None:
        terms.append(Uniform(weights.uniform, at_1=at_1))
    if weights.lse_squared is not None:
        terms.append(LseSquared(weights.lse_squared, at_1=at_1))
    return terms


class Compared(NamedTuple):
    """A teacher, and how the student is compared with it."""

    teacher: Source
    is_differentiated: bool
    divergence: Divergence  # without the arrays among its parameters
    parameters: list[Parameter]
    temperature: Any  # None: 1, or the student's
    same_temperature: bool  # as the student's


def comparison(folded: Folded, x: Compared, rounded_to: jnp.dtype | None) -> Comparison:
    """The term of a teacher.

    `rounded_to` is the dtype of the student's logits, if nothing else has a part in
    their gradient.
    """
    is_row = isinstance(x.teacher, ListSource) and x.teacher.is_row
    of_rows = ft.partial(ListComparison, d_dtype=rounded_to)
    return (of_rows if is_row else DenseComparison)(
        folded.term_weights.divergence,
        x.teacher,
        folded.parameters,
        folded.teacher_temperature,
        divergence=x.divergence,
        same_temperature=x.same_temperature,
    )
