"""From the arguments of a distillation loss to the operands of the engine.

All that reduces, masks or mixes is folded into one weight per token and term. Autodiff
does the rest: the gradients of weights, T² and the normaliser are those of the few
lines in `_term_weights`.
"""

import functools as ft
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from .._divergence.catalogue import Divergence
from .._divergence.parameters import as_operand, Interval, split
from .._engine.evaluate import Prepared
from .._engine.layout import as_layout, Layout
from .._engine.operands import LossTerms, Operands, PlanName, Spec
from .._math.numerics import loss_dtype, zero_unless
from .._math.vocabulary import Vocabulary
from .._source.base import as_source, flattened, Given, NoTeacher, Source
from .._source.list_source import ListSource
from .._source.sparse_teacher import SparseTeacher
from .._util import checks as check
from .arguments import (
    as_labels,
    as_mask,
    as_vocabulary,
    check_divergence,
    check_slices,
    IGNORED_LABEL,
    per_token,
)
from .list_teacher import ABSENT, as_teacher
from .swapped import as_constant


REDUCTIONS = ("none", "sum", "mean")
PLANS = ("fast", "lean")

Reduction = Literal["none", "sum", "mean"]


def prepare(
    student: ArrayLike | Given,
    teacher: ArrayLike | Given,
    *,
    divergence: Divergence | None,
    temperature: ArrayLike,
    teacher_temperature: ArrayLike | None,
    t_squared: bool,
    labels: ArrayLike | None,
    alpha: ArrayLike | None,
    label_smoothing: ArrayLike,
    z_loss: ArrayLike,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    vocab_size: int | None,
    differentiate_teacher: bool,
    reduction: Reduction,
    normalizer: ArrayLike | None,
    axis_name: str | None,
    mesh: Mesh | AbstractMesh | None,
    token_axes: str | Sequence[str] | None,
    vocab_axis: str | None,
    tile: int | None,
    plan: PlanName | None,
    statistics: bool = False,
) -> Prepared:
    """Checks the arguments of `distillation_loss` and makes the engine's operands.

    `statistics` is whether the metrics are asked for too. With `NoTeacher()`, the loss
    is that of the student alone: then `divergence` is not looked at, and a token
    without a label does not count.
    """
    check.one_of("reduction", reduction, REDUCTIONS)
    t_squared = check.boolean("t_squared", t_squared)
    differentiate_teacher = check.boolean(
        "differentiate_teacher", differentiate_teacher
    )
    models = checked_models(
        student,
        teacher,
        where=where,
        vocab_size=vocab_size,
        axis_name=axis_name,
        mesh=mesh,
        token_axes=token_axes,
        vocab_axis=vocab_axis,
        tile=tile,
        plan=plan,
    )
    of_student, of_teacher, vocab, mask, layout, shape = models
    is_alone = isinstance(of_teacher, NoTeacher)
    T = check.temperature("temperature", temperature, shape)
    T_teacher = ABSENT
    if teacher_temperature is not None:
        name = "teacher_temperature"
        T_teacher = check.temperature(name, teacher_temperature, shape)
    static, parameters = None, []
    if not is_alone:
        is_spread = not (axis_name is None and vocab_axis is None)
        check_divergence(divergence, vocab, of_teacher, is_spread)
        static, parameters = split(divergence)
        if not differentiate_teacher:
            of_teacher = as_constant(of_student, of_teacher)
    if isinstance(of_teacher, ListSource):
        assert isinstance(teacher, SparseTeacher) and static is not None
        of_teacher = as_teacher(
            teacher,
            of_teacher,
            static,
            vocab.size,
            mask,
            temperature=T,
            teacher_temperature=T_teacher,
            differentiate=differentiate_teacher,
        )
    same_temperature = T_teacher is ABSENT and not of_teacher.is_normalized
    if T_teacher is ABSENT or of_teacher.is_normalized:
        T_teacher = None
    if weights is not None:
        weights = check.float_array("weights", weights)
        check.of_shape("weights", weights, shape, "the batch shape")
    columns = None
    if is_alone or labels is not None:
        columns = as_labels(labels, mask, shape, vocab.size)
    parameter_arrays = tuple(x.checked(shape) for x in parameters)
    arrays = jax.tree.leaves((T, T_teacher, weights, of_student, of_teacher))
    arrays += [*parameter_arrays, of_student.vocab_array, of_teacher.vocab_array]
    dtype = loss_dtype(*(x for x in arrays if not check.is_number(x)))
    given = _Given(
        weights,
        mask,
        columns,
        T,
        T_teacher,
        _checked_normalizer(normalizer, reduction),
        _alpha(alpha, columns, statistics),
        check.scalar("label_smoothing", label_smoothing, 0, 1),
        check.scalar("z_loss", z_loss, 0),
        parameter_arrays,
    )
    mixing = given.alpha, given.label_smoothing, given.z_loss
    folding = _Folding(
        shape,
        dtype,
        vocab.size,
        mean=reduction == "mean",
        t_squared=t_squared,
        has_divergence=not is_alone,
        has_label=columns is not None and (statistics or _may_differ(mixing[0], 1)),
        has_uniform=_may_differ(given.label_smoothing, 0),
        has_lse=_may_differ(given.z_loss, 0),
        are_known=all(map(check.is_known, mixing)),
        intervals=tuple(x.interval for x in parameters),
    )
    folded = _fold(folding, given)
    sources = (
        source.with_weightless(folded.weightless, folded.dropped)
        for source in (of_student, of_teacher)
    )
    operands = Operands(
        *sources,
        weights=folded.term_weights,
        student_temperature=folded.temperature,
        teacher_temperature=folded.teacher_temperature,
        labels=columns,
        mask=mask,
        parameters=folded.parameters,
    )
    passes_float16 = of_student.passes_float16
    passes_float16 |= differentiate_teacher and of_teacher.passes_float16
    spec = Spec(
        static,
        vocab,
        dtype,
        reduce=reduction != "none",
        statistics=statistics,
        same_temperature=same_temperature,
        tile=tile,
        plan=plan,
        passes_float16=passes_float16,
    )
    if axis_name is not None:
        check_slices(axis_name, operands)
    return Prepared(
        spec, operands, layout, folded.weight, label_smoothing, shape, folded.factor
    )


class CheckedModels(NamedTuple):
    """What any walk over tokens is given, its tokens flattened to one axis."""

    student: Source
    teacher: Source
    vocab: Vocabulary
    mask: jax.Array | None  # [B], of `where`
    layout: Layout | None
    batch_shape: tuple[int, ...]


def checked_models(
    student: ArrayLike | Given,
    teacher: ArrayLike | Given,
    *,
    where: ArrayLike | None,
    vocab_size: int | None,
    axis_name: str | None,
    mesh: Mesh | AbstractMesh | None,
    token_axes: str | Sequence[str] | None,
    vocab_axis: str | None,
    tile: int | None,
    plan: PlanName | None,
) -> CheckedModels:
    if tile is not None:
        tile = check.positive_int("tile", tile)
    if plan is not None:
        check.one_of("plan", plan, PLANS)
    if plan == "lean" and tile is not None:
        raise ValueError(
            f'`tile` must be None with plan="lean", which has no tiles; got {tile}.'
        )
    layout = as_layout(mesh, token_axes, vocab_axis, axis_name)
    student, teacher = as_source("student", student), as_source("teacher", teacher)
    for name, source in (("student", student), ("teacher", teacher)):
        if plan == "lean" and not source.makes_blocks:
            raise ValueError(
                f'`plan` must not be "lean" with a FunctionHead as `{name}`, whose '
                "columns can be made together only; take a LinearHead or another plan."
            )
        if layout is not None and not source.splits_columns:
            layout = layout.without_vocab_axis()
    shape = student.batch_shape
    if not isinstance(teacher, NoTeacher) and shape != teacher.batch_shape:
        raise ValueError(
            "`student` and `teacher` must have the same batch shape, got "
            f"{shape} and {teacher.batch_shape}."
        )
    student, teacher = flattened(student), flattened(teacher)
    vocab = as_vocabulary(vocab_size, student, teacher, axis_name)
    mask = None if where is None else as_mask(where, shape)
    return CheckedModels(student, teacher, vocab, mask, layout, shape)


class _Given(NamedTuple):
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


class _Folding(NamedTuple):
    """How they are made of it."""

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


class _Folded(NamedTuple):
    """Of each token, `[B]`, but for the factor."""

    weight: jax.Array
    term_weights: LossTerms
    temperature: jax.Array | None
    teacher_temperature: jax.Array | None
    parameters: tuple[jax.Array, ...]
    factor: jax.Array | None  # of the loss, see `_one_over`; None: 1
    weightless: jax.Array  # whether no term has a weight
    dropped: jax.Array  # and none whatever `weights` are, as by a label of -100


@ft.partial(jax.jit, static_argnums=0, inline=True)
def _fold(how: _Folding, x: _Given) -> _Folded:
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
    weightless = ~term_weights.any_nonzero
    parameters = zip(x.parameters, how.intervals, strict=True)
    return _Folded(
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


def _checked_normalizer(normalizer: ArrayLike | None, reduction: Reduction) -> Any:
    """What divides the sum over tokens, if it is given."""
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(
            '`normalizer` must be None unless `reduction` is "mean", got '
            f"{normalizer!r} with {reduction!r}."
        )
    if check.is_integer(normalizer):  # the sum of a mask
        normalizer = jnp.asarray(normalizer, jnp.result_type(float))
    return check.scalar("normalizer", normalizer, 0, positive=True)


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


def _alpha(
    alpha: ArrayLike | None, labels: jax.Array | None, for_metrics: bool
) -> ArrayLike:
    """`alpha`, checked beside the labels; it is 1 where it may be left out."""
    if alpha is None:
        if labels is not None and not for_metrics:
            raise ValueError(
                "`alpha` must be given with `labels`: the loss is alpha times the "
                "divergence and 1 - alpha times the cross-entropy. alpha=1.0 leaves "
                "the labels out."
            )
        return 1.0
    value = check.scalar("alpha", alpha, 0, 1)
    if labels is not None:
        return value
    if not check.is_known(value):
        return jnp.where(value == 1, value, jnp.nan)
    if value != 1:
        raise ValueError(f"`alpha` must be 1 without `labels`, got {value}.")
    return value


def _term_weights(
    how: _Folding, x: _Given, weight: jax.Array, temperature: jax.Array | None
) -> LossTerms:
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
    return LossTerms(divergence, label, uniform, lse_squared)


def _may_differ(x: Any, number: float) -> bool:
    return not check.is_known(x) or x != number


def _times(weight: jax.Array, factor: jax.Array) -> jax.Array:
    """The product. A factor of 0 leaves a term out, even where the term is infinite:
    then its gradient, which is that of the weight, is 0 too."""
    return zero_unless(factor != 0, weight * factor)
