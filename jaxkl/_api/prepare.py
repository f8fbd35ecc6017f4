"""From the arguments of a distillation loss to the operands of the engine: each is
checked, in Python, and all are folded into weights, in one program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._divergence.parameters import split
from .._engine.evaluate import Prepared
from .._engine.layout import as_layout, Layout
from .._engine.operands import Operands, Spec
from .._math.numerics import loss_dtype
from .._math.vocabulary import Vocabulary
from .._source.base import flattened, Given, Source
from .._source.list_source import ListSource
from .._source.logits import as_source, NoTeacher
from .._source.sparse_teacher import SparseTeacher
from .._util import checks as check
from .arguments import (
    as_labels,
    as_mask,
    as_vocabulary,
    check_divergence,
    check_slices,
)
from .fold import Arguments, fold, Folding
from .list_teacher import ABSENT, as_teacher
from .options import LossOptions, Options, Reduction
from .swapped import as_constant


REDUCTIONS = ("none", "sum", "mean")
PLANS = ("fast", "lean")


def prepare(options: LossOptions, *, statistics: bool = False) -> Prepared:
    """Checks the arguments of a loss and makes the engine's operands.

    `statistics` is whether the metrics are asked for too. With `NoTeacher()`, the loss
    is that of the student alone: then `divergence` is not looked at, and a token
    without a label does not count.
    """
    check.one_of("reduction", options.reduction, REDUCTIONS)
    t_squared = check.boolean("t_squared", options.t_squared)
    differentiate_teacher = check.boolean(
        "differentiate_teacher", options.differentiate_teacher
    )
    models = checked_models(options, options.teacher)
    of_student, of_teacher, vocab, mask, layout, shape = models
    is_alone = isinstance(of_teacher, NoTeacher)
    T = check.temperature("temperature", options.temperature, shape)
    T_teacher = ABSENT
    if options.teacher_temperature is not None:
        name = "teacher_temperature"
        T_teacher = check.temperature(name, options.teacher_temperature, shape)
    static, parameters = None, []
    if not is_alone:
        is_spread = not (options.axis_name is None and options.vocab_axis is None)
        check_divergence(options.divergence, vocab, of_teacher, is_spread)
        static, parameters = split(options.divergence)
        if not differentiate_teacher:
            of_teacher = as_constant(of_student, of_teacher)
    if isinstance(of_teacher, ListSource):
        assert isinstance(options.teacher, SparseTeacher) and static is not None
        of_teacher = as_teacher(
            options.teacher,
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
    weights = options.weights
    if weights is not None:
        weights = check.float_array("weights", weights)
        check.of_shape("weights", weights, shape, "the batch shape")
    columns = None
    if is_alone or options.labels is not None:
        columns = as_labels(options.labels, mask, shape, vocab.size)
    parameter_arrays = tuple(x.checked(shape) for x in parameters)
    arrays = jax.tree.leaves((T, T_teacher, weights, of_student, of_teacher))
    arrays += [*parameter_arrays, of_student.vocab_array, of_teacher.vocab_array]
    dtype = loss_dtype(*(x for x in arrays if not check.is_number(x)))
    arguments = Arguments(
        weights,
        mask,
        columns,
        T,
        T_teacher,
        _checked_normalizer(options.normalizer, options.reduction),
        _alpha(options.alpha, columns, statistics),
        check.scalar("label_smoothing", options.label_smoothing, 0, 1),
        check.scalar("z_loss", options.z_loss, 0),
        parameter_arrays,
    )
    mixing = arguments.alpha, arguments.label_smoothing, arguments.z_loss
    is_labelled = statistics or _may_differ(arguments.alpha, 1)
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
        reduce=options.reduction != "none",
        statistics=statistics,
        same_temperature=same_temperature,
        tile=options.tile,
        plan=options.plan,
        passes_float16=passes_float16,
    )
    if options.axis_name is not None:
        check_slices(options.axis_name, operands)
    return Prepared(
        spec,
        operands,
        layout,
        folded.weight,
        options.label_smoothing,
        shape,
        folded.factor,
    )


class CheckedModels(NamedTuple):
    """What any walk over tokens is given, its tokens flattened to one axis."""

    student: Source
    teacher: Source
    vocab: Vocabulary
    mask: jax.Array | None  # [B], of `where`
    layout: Layout | None
    batch_shape: tuple[int, ...]


def checked_models(options: Options, teacher: ArrayLike | Given) -> CheckedModels:
    tile, plan, axis_name = options.tile, options.plan, options.axis_name
    if tile is not None:
        tile = check.positive_int("tile", tile)
    if plan is not None:
        check.one_of("plan", plan, PLANS)
    if plan == "lean" and tile is not None:
        raise ValueError(
            f'`tile` must be None with plan="lean", which has no tiles; got {tile}.'
        )
    layout = as_layout(options.mesh, options.token_axes, options.vocab_axis, axis_name)
    student = as_source("student", options.student)
    teacher = as_source("teacher", teacher)
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
    vocab = as_vocabulary(options.vocab_size, student, teacher, axis_name)
    mask = None if options.where is None else as_mask(options.where, shape)
    return CheckedModels(student, teacher, vocab, mask, layout, shape)


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
