"""From the arguments of a distillation loss to the operands of the engine: each is
checked, in Python, and all are folded into weights, in one program."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._divergence.parameters import split
from .._engine.operands import Operands, Spec
from .._engine.sharding import Prepared
from .._math.numerics import loss_dtype
from .._source.sparse_teacher import ListSource, SparseTeacher
from .._util import checks as check
from .arguments import (
    as_labels,
    check_divergence,
    check_slices,
    checked_models,
    CheckedModels,
)
from .fold import Arguments, Compared, comparison, fold, Folding, student_terms
from .list_teacher import ABSENT, as_teacher
from .options import LabelOptions, LossOptions, Reduction
from .swapped import as_constant


def prepare(options: LabelOptions, *, metrics: bool = False) -> Prepared:
    """Checks the arguments of a loss and makes the engine's operands.

    `metrics` is whether they are asked for too. Without a teacher, all terms
    are the student's, and a token without a label does not count.
    """
    check.one_of("reduction", options.reduction, get_args(Reduction))
    teachers: list[Compared] = []
    if isinstance(options, LossOptions):
        t_squared = check.boolean("t_squared", options.t_squared)
        models = checked_models(options, options.teacher)
        T = check.temperature("temperature", options.temperature, models.batch_shape)
        teachers, alpha = [_compared(options, models, T)], options.alpha
    else:
        models = checked_models(options)
        t_squared, T, alpha = False, None, 0.0
    (student, *_), vocab, mask, layout, shape = models
    is_alone = not teachers
    T_teacher = teachers[0].temperature if teachers else None
    parameters = [parameter for x in teachers for parameter in x.parameters]
    weights = options.weights
    if weights is not None:
        weights = check.float_array("weights", weights)
        check.of_shape("weights", weights, shape, "the batch shape")
    columns = None
    if is_alone or options.labels is not None:
        columns = as_labels(options.labels, mask, shape, vocab.size)
    parameter_arrays = tuple(x.checked(shape) for x in parameters)
    sources = [student, *(x.teacher for x in teachers)]
    arrays = [*jax.tree.leaves((T, T_teacher, weights, sources)), *parameter_arrays]
    arrays += [source.vocab_array for source in sources]
    dtype = loss_dtype(*(x for x in arrays if not check.is_number(x)))
    arguments = Arguments(
        weights,
        mask,
        columns,
        T,
        T_teacher,
        _checked_normalizer(options.normalizer, options.reduction),
        _alpha(alpha, columns, metrics),
        check.scalar("label_smoothing", options.label_smoothing, 0, 1),
        check.scalar("z_loss", options.z_loss, 0),
        parameter_arrays,
    )
    mixing = arguments.alpha, arguments.label_smoothing, arguments.z_loss
    is_labelled = metrics or _may_differ(arguments.alpha, 1)
    how = Folding(
        shape,
        dtype,
        vocab.size,
        mean=options.reduction == "mean",
        t_squared=t_squared,
        has_divergence=not is_alone,
        has_label=columns is not None and is_labelled,
        has_uniform=_may_differ(arguments.label_smoothing, 0),
        has_lse=_may_differ(arguments.z_loss, 0),
        are_known=all(map(check.is_known, mixing)),
        intervals=tuple(x.interval for x in parameters),
    )
    folded = fold(how, arguments)
    terms: list[Any] = list(student_terms(folded, columns, at_1=not is_alone))
    rounded_to = None
    if not terms and student.kind == "logits":
        rounded_to = student.vocab_array.dtype
    of_teachers = [comparison(folded, x, rounded_to) for x in teachers]
    operands = Operands(student, (*of_teachers, *terms), folded.temperature, mask)
    operands = operands.map_sources(
        lambda source: source.with_weightless(folded.weightless, folded.dropped)
    )
    spec = Spec(
        vocab,
        dtype,
        reduce=options.reduction != "none",
        metrics=metrics,
        tile=options.tile,
        plan=options.plan,
        passes_float16=student.passes_float16
        or any(x.is_differentiated and x.teacher.passes_float16 for x in teachers),
    )
    if options.axis_name is not None:
        check_slices(options.axis_name, operands)
    return Prepared(
        spec,
        operands,
        layout,
        shape,
        folded.factor,
        folded.weight,
        options.label_smoothing,
    )


def _compared(options: LossOptions, models: CheckedModels, T: Any) -> Compared:
    """The teacher, once all that concerns it is checked; `T` is the loss's."""
    (student, teacher), vocab, mask, _, shape = models
    differentiate = check.boolean(
        "differentiate_teacher", options.differentiate_teacher
    )
    T_teacher = ABSENT
    if options.teacher_temperature is not None:
        name = "teacher_temperature"
        T_teacher = check.temperature(name, options.teacher_temperature, shape)
    is_spread = not (options.axis_name is None and options.vocab_axis is None)
    check_divergence(options.divergence, vocab, teacher, is_spread)
    divergence, parameters = split(options.divergence)
    if not differentiate:
        teacher = as_constant(student, teacher)
    if isinstance(teacher, ListSource):
        assert isinstance(options.teacher, SparseTeacher)
        teacher = as_teacher(
            options.teacher,
            teacher,
            divergence,
            vocab.size,
            mask,
            temperature=T,
            teacher_temperature=T_teacher,
            differentiate=differentiate,
        )
    # The log-probabilities of a list are at a temperature of their own.
    same_temperature = T_teacher is ABSENT and not teacher.is_normalized
    if T_teacher is ABSENT or teacher.is_normalized:
        T_teacher = None
    return Compared(
        teacher,
        differentiate,
        divergence,
        parameters,
        T_teacher,
        same_temperature,
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


def _may_differ(x: Any, number: float) -> bool:
    return not check.is_known(x) or x != number
