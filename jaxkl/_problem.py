"""From the arguments of a distillation loss to the operands of the engine.

All that reduces, masks or mixes is folded into one weight per token and term, so that
autodiff does the rest: the gradients of weights, temperature² and the normaliser are
those of the few lines in `_term_weights`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from . import _checks as check
from ._arguments import (
    as_labels,
    as_mask,
    as_source,
    check_divergence,
    check_slices,
    check_sparse,
    IGNORED_LABEL,
    per_token,
    vocabulary_of,
)
from ._divergences import Divergence, ForwardKL
from ._numerics import loss_dtype, zero_unless
from ._order import as_constant
from ._sparse import check_columns, SparseTeacher
from ._tile import Operands, Spec, Terms


REDUCTIONS = ("none", "sum", "mean")

Reduction = Literal["none", "sum", "mean"]


class Problem(NamedTuple):
    """A validated loss, with its tokens flattened to one axis."""

    spec: Spec
    operands: Operands
    weight: jax.Array  # [B], before the normaliser
    label_smoothing: Any
    shape: tuple[int, ...]  # of the tokens


def prepare(
    student,
    teacher,
    *,
    divergence: Divergence = ForwardKL(),
    temperature=1.0,
    teacher_temperature=None,
    t_squared: bool = True,
    labels=None,
    alpha=None,
    label_smoothing=0.0,
    z_loss=0.0,
    where=None,
    weights=None,
    vocab_size: int | None = None,
    differentiate_teacher: bool = False,
    reduction: Reduction = "mean",
    normalizer=None,
    axis_name: str | None = None,
    tile: int | None = None,
    statistics: bool = False,
    is_spread: bool = False,  # the vocabulary, over a mesh, when all this is done
) -> Problem:
    check.one_of("reduction", reduction, REDUCTIONS)
    t_squared = check.boolean("t_squared", t_squared)
    tile = None if tile is None else check.positive_int("tile", tile)
    student, shape = as_source("student", student)
    teacher, teacher_shape = as_source("teacher", teacher)
    if shape != teacher_shape:
        raise ValueError(
            "`student` and `teacher` must have the same batch shape, got "
            f"{shape} and {teacher_shape}."
        )
    vocab = vocabulary_of(vocab_size, student, teacher, axis_name)
    columns = vocab.size
    check_divergence(divergence, vocab, teacher, is_spread)
    mask = None if where is None else as_mask(where, shape)
    if not check.boolean("differentiate_teacher", differentiate_teacher):
        teacher = as_constant(student, teacher)
    if isinstance(teacher, SparseTeacher):
        check_sparse(divergence, teacher, teacher_temperature, differentiate_teacher)
        teacher, teacher_temperature = check_columns(teacher, columns, mask), 1.0

    temperature = check.temperature("temperature", temperature, shape)
    same_temperature = teacher_temperature is None
    if not same_temperature:
        name = "teacher_temperature"
        teacher_temperature = check.temperature(name, teacher_temperature, shape)
    weights = None if weights is None else check.float_array("weights", weights)
    floats = temperature, teacher_temperature, weights, student, teacher
    arrays = [x for x in jax.tree.leaves(floats) if not check.is_number(x)]
    dtype = loss_dtype(*arrays)
    temperature = per_token(temperature, shape, dtype)
    teacher_temperature = per_token(teacher_temperature, shape, dtype)

    if mask is not None:
        known = lambda x: None if x is None else jnp.where(mask, x, 1)
        temperature, teacher_temperature = (
            known(temperature),
            known(teacher_temperature),
        )
    weight = _weight(weights, mask, shape, dtype)
    labels = None if labels is None else as_labels(labels, mask, shape, columns)
    term_weights = _term_weights(
        _normalized(weight, reduction, normalizer),
        temperature if t_squared else None,
        labels,
        vocab_size=columns,
        alpha=_alpha(alpha, labels, statistics),
        label_smoothing=check.scalar("label_smoothing", label_smoothing, 0, 1),
        z_loss=check.scalar("z_loss", z_loss, 0),
        statistics=statistics,
    )
    if mask is not None:
        term_weights = jax.tree.map(lambda w: zero_unless(mask, w), term_weights)
    operands = Operands(
        student, teacher, term_weights, temperature, teacher_temperature, labels, mask
    )
    reduce = reduction != "none"
    spec = Spec(divergence, vocab, dtype, reduce, statistics, same_temperature, tile)
    if axis_name is not None:
        check_slices(axis_name, operands)
    return Problem(spec, operands, weight, label_smoothing, shape)


def _weight(weights, mask, shape, dtype):
    weight = jnp.ones(shape, dtype)
    if weights is not None:
        weight = check.of_shape("weights", weights, shape, "the batch shape").astype(
            dtype
        )
    weight = weight.reshape(-1)
    return weight if mask is None else zero_unless(mask, weight)


def _normalized(weight, reduction, normalizer):
    if reduction != "mean":
        if normalizer is not None:
            raise ValueError(
                '`normalizer` must be None unless `reduction` is "mean", got '
                f"{normalizer!r} with {reduction!r}."
            )
        return weight
    if normalizer is None:
        total = jnp.sum(weight)
    else:
        if check.is_integer(normalizer):
            normalizer = jnp.asarray(normalizer, weight.dtype)  # the sum of a mask
        total = check.scalar("normalizer", normalizer, 0, positive=True)
        total = jax.lax.stop_gradient(jnp.asarray(total, weight.dtype))
    # No weight at all: a loss of 0, with no gradient.
    return zero_unless(total != 0, weight / jnp.where(total != 0, total, 1))


def _alpha(alpha, labels, for_metrics):
    """Checked beside the labels; None, where it may be left out, is 1."""
    if alpha is None:
        if labels is not None and not for_metrics:
            raise ValueError(
                "`alpha` must be given with `labels`: the loss is alpha times the "
                "divergence and 1 - alpha times the cross-entropy. alpha=1.0 leaves "
                "the labels out."
            )
        return 1.0
    alpha = check.scalar("alpha", alpha, 0, 1)
    if labels is not None:
        return alpha
    if not check.is_known(alpha):
        return jnp.where(alpha == 1, alpha, jnp.nan)
    if alpha != 1:
        raise ValueError(f"`alpha` must be 1 without `labels`, got {alpha}.")
    return alpha


def _term_weights(
    weight,
    temperature,
    labels,
    *,
    vocab_size,
    alpha,
    label_smoothing,
    z_loss,
    statistics,
) -> Terms:
    """`weight · (α T² D + (1-α) CE + z_loss lse²)`, as a weight for each term."""
    may_differ = lambda x, other: not check.is_known(x) or x != other
    has_cross_entropy = statistics or may_differ(alpha, 1)
    has_uniform, has_lse = may_differ(label_smoothing, 0), may_differ(z_loss, 0)
    are_known = all(map(check.is_known, (alpha, label_smoothing, z_loss)))
    alpha, smoothing, z_weight = (
        jax.lax.stop_gradient(jnp.asarray(x, weight.dtype))
        for x in (alpha, label_smoothing, z_loss)
    )
    if not are_known:
        # One out of range is NaN, and makes the loss NaN, whatever its term is.
        weight = jnp.where(jnp.isnan(alpha + smoothing + z_weight), jnp.nan, weight)
    # A term with factor 0 is absent, even where it is infinite.
    times = lambda weight, factor: zero_unless(factor != 0, weight * factor)
    divergence = times(weight, alpha)
    if temperature is not None:
        # A token without weight may hold NaN: keep its divergence off temperature's
        # gradient.
        squared = temperature * temperature
        known = zero_unless(jnp.isfinite(squared), squared)
        divergence *= jnp.where(weight != 0, squared, jax.lax.stop_gradient(known))
    label = uniform = lse_squared = None
    if labels is not None and has_cross_entropy:
        valid = (labels >= 0) & (labels < vocab_size)
        label = zero_unless(labels != IGNORED_LABEL, times(weight, 1 - alpha))
        # Under `jit` a label out of range can not raise: it makes the loss NaN.
        label = jnp.where(valid | (labels == IGNORED_LABEL), label, jnp.nan)
        if has_uniform:
            label, uniform = times(label, 1 - smoothing), times(label, smoothing)
    if has_lse:
        lse_squared = times(weight, z_weight)
    return Terms(divergence, label, uniform, lse_squared)
