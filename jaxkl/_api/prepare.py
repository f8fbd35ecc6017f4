"""From the arguments of a distillation loss to the operands of the engine.

All that reduces, masks or mixes is folded into one weight per token and term. Autodiff
does the rest: the gradients of weights, T² and the normaliser are those of the few
lines in `_term_weights`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from .._divergence.catalogue import Divergence
from .._divergence.parameters import split
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
    given_teacher = teacher
    student, teacher, vocab, mask, layout, shape = models
    is_alone = isinstance(teacher, NoTeacher)
    temperature = check.temperature("temperature", temperature, shape)
    is_given = teacher_temperature is not None
    if is_given:
        name = "teacher_temperature"
        teacher_temperature = check.temperature(name, teacher_temperature, shape)
    static, parameters = None, []
    if not is_alone:
        is_spread = not (axis_name is None and vocab_axis is None)
        check_divergence(divergence, vocab, teacher, is_spread)
        static, parameters = split(divergence)
        if not check.boolean("differentiate_teacher", differentiate_teacher):
            teacher = jax.lax.stop_gradient(teacher)
    if isinstance(teacher, ListSource):
        assert isinstance(given_teacher, SparseTeacher) and static is not None
        teacher = as_teacher(
            given_teacher,
            teacher,
            static,
            vocab.size,
            mask,
            temperature=temperature,
            teacher_temperature=teacher_temperature if is_given else ABSENT,
            differentiate=differentiate_teacher,
        )
    same_temperature = not (is_given or teacher.is_normalized)
    if teacher.is_normalized:
        teacher_temperature = None
    temperatures = [temperature, teacher_temperature]
    weights = None if weights is None else check.float_array("weights", weights)
    parameter_arrays = [check.float_array(x.name, x.value) for x in parameters]
    arrays = jax.tree.leaves((temperatures, weights, student, teacher))
    arrays += [*parameter_arrays, student.vocab_array, teacher.vocab_array]
    dtype = loss_dtype(*(x for x in arrays if not check.is_number(x)))
    temperatures = [per_token(x, shape, dtype) for x in temperatures]
    if mask is not None:
        # The temperature of a token that does not count may be NaN.
        temperatures = jax.tree.map(lambda x: jnp.where(mask, x, 1), temperatures)

    weight = _weight(weights, mask, shape, dtype)
    if is_alone or labels is not None:
        labels = as_labels(labels, mask, shape, vocab.size)
    given_weight = weight
    if is_alone:
        weight = zero_unless(labels != IGNORED_LABEL, weight)
    total = _total(weight, reduction, normalizer)
    factor = None
    if total is not None and weights is not None and normalizer is None:
        factor = _one_over(jnp.where(total != 0, total, 1))
    term_weights = _term_weights(
        _normalized(weight, total),
        temperatures[0] if t_squared else None,
        labels,
        vocab_size=vocab.size,
        alpha=_alpha(alpha, labels, statistics),
        label_smoothing=check.scalar("label_smoothing", label_smoothing, 0, 1),
        z_loss=check.scalar("z_loss", z_loss, 0),
        statistics=statistics,
    )
    if is_alone:
        term_weights = term_weights._replace(divergence=None)
    if mask is not None:
        term_weights = jax.tree.map(lambda w: zero_unless(mask, w), term_weights)
    weightless = ~term_weights.any_nonzero
    dropped = weightless & (given_weight != 0)  # as by a label of -100
    student, teacher = (x.spared(weightless, dropped) for x in (student, teacher))
    operands = Operands(
        student,
        teacher,
        term_weights,
        temperatures[0],
        temperatures[1],
        labels,
        mask,
        tuple(x.as_operand(shape, dtype, mask) for x in parameters),
    )
    reduce = reduction != "none"
    passes_float16 = student.passes_float16
    passes_float16 |= bool(differentiate_teacher) and teacher.passes_float16
    spec = Spec(
        static,
        vocab,
        dtype,
        reduce,
        statistics,
        same_temperature,
        tile,
        plan,
        passes_float16,
    )
    if axis_name is not None:
        check_slices(axis_name, operands)
    return Prepared(spec, operands, layout, weight, label_smoothing, shape, factor)


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


def _weight(
    weights: jax.Array | None,
    mask: jax.Array | None,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    if weights is None:
        weights = jnp.ones(shape, dtype)
    check.of_shape("weights", weights, shape, "the batch shape")
    weight = weights.astype(dtype).reshape(-1)
    return weight if mask is None else zero_unless(mask, weight)


def _total(
    weight: jax.Array, reduction: Reduction, normalizer: ArrayLike | None
) -> jax.Array | None:
    """What divides the sum over tokens, if anything does."""
    if reduction != "mean":
        if normalizer is not None:
            raise ValueError(
                '`normalizer` must be None unless `reduction` is "mean", got '
                f"{normalizer!r} with {reduction!r}."
            )
        return None
    if normalizer is None:
        return jnp.sum(weight)
    if check.is_integer(normalizer):
        normalizer = jnp.asarray(normalizer, weight.dtype)  # the sum of a mask
    total = check.scalar("normalizer", normalizer, 0, positive=True)
    return jnp.asarray(total, weight.dtype)


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
    weight: jax.Array,
    temperature: jax.Array | None,
    labels: jax.Array | None,
    *,
    vocab_size: int,
    alpha: ArrayLike,
    label_smoothing: ArrayLike,
    z_loss: ArrayLike,
    statistics: bool,
) -> LossTerms:
    """`weight · (α T² D + (1-α) CE + z_loss lse²)`, as a weight for each term.

    `temperature` is None if there is no factor T².
    """
    has_cross_entropy = statistics or _may_differ(alpha, 1)
    has_uniform, has_lse = _may_differ(label_smoothing, 0), _may_differ(z_loss, 0)
    are_known = all(map(check.is_known, (alpha, label_smoothing, z_loss)))
    alpha, smoothing, z_weight = (
        jax.lax.stop_gradient(jnp.asarray(x, weight.dtype))
        for x in (alpha, label_smoothing, z_loss)
    )
    if not are_known:
        # A number that is out of range is NaN. It makes the loss NaN, also where its
        # own term has no part in it.
        weight = jnp.where(jnp.isnan(alpha + smoothing + z_weight), jnp.nan, weight)
    divergence = _times(weight, alpha)
    if temperature is not None:
        # A token without weight may hold NaN, and its divergence must not enter the
        # gradient of its temperature.
        squared = temperature * temperature
        constant = jax.lax.stop_gradient(zero_unless(jnp.isfinite(squared), squared))
        divergence *= jnp.where(weight != 0, squared, constant)
    label = uniform = lse_squared = None
    if labels is not None and has_cross_entropy:
        valid = (labels >= 0) & (labels < vocab_size)
        label = zero_unless(labels != IGNORED_LABEL, _times(weight, 1 - alpha))
        # Under `jit` a label that is out of range cannot raise: it makes the loss NaN.
        label = jnp.where(valid | (labels == IGNORED_LABEL), label, jnp.nan)
        if has_uniform:
            label, uniform = _times(label, 1 - smoothing), _times(label, smoothing)
    if has_lse:
        lse_squared = _times(weight, z_weight)
    return LossTerms(divergence, label, uniform, lse_squared)


def _may_differ(x: Any, number: float) -> bool:
    return not check.is_known(x) or x != number


def _times(weight: jax.Array, factor: jax.Array) -> jax.Array:
    """The product. A factor of 0 leaves a term out, even where the term is infinite:
    then its gradient, which is that of the weight, is 0 too."""
    return zero_unless(factor != 0, weight * factor)
