"""From the arguments of a distillation loss to the operands of the engine.

All that reduces, masks or mixes is folded into one weight per token and term, so that
autodiff does the rest: the gradients of weights, temperature² and the normaliser are
those of the few lines in `_term_weights`.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks as check
from ._compat import varying_axes
from ._divergences import Divergence, ForwardKL
from ._linear_head import LinearHead
from ._numerics import loss_dtype, zero_unless
from ._sources import Logits, Source
from ._sparse import check_columns, check_tail, SparseTeacher
from ._tile import Operands, Spec, Terms
from ._vocabulary import Vocabulary


IGNORED_LABEL = -100
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
    alpha=1.0,
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
) -> Problem:
    check.one_of("reduction", reduction, REDUCTIONS)
    t_squared = check.boolean("t_squared", t_squared)
    tile = None if tile is None else check.positive_int("tile", tile)
    student, shape = _source("student", student)
    teacher, teacher_shape = _source("teacher", teacher)
    if shape != teacher_shape:
        raise ValueError(
            "`student` and `teacher` must have the same batch shape, got "
            f"{shape} and {teacher_shape}."
        )
    vocab = _vocabulary(vocab_size, student, teacher, axis_name)
    columns = vocab.size
    check_divergence(divergence, columns)
    mask = None if where is None else _mask(where, shape)
    if not check.boolean("differentiate_teacher", differentiate_teacher):
        teacher = jax.lax.stop_gradient(teacher)
    if isinstance(teacher, SparseTeacher):
        _check_sparse(divergence, teacher, teacher_temperature, differentiate_teacher)
        teacher, teacher_temperature = check_columns(teacher, columns, mask), 1.0

    temperature = check.temperature("temperature", temperature, shape)
    if teacher_temperature is None:
        teacher_temperature = temperature
    else:
        name = "teacher_temperature"
        teacher_temperature = check.temperature(name, teacher_temperature, shape)
    weights = None if weights is None else check.float_array("weights", weights)
    floats = [x for x in (temperature, teacher_temperature, weights) if x is not None]
    dtype = loss_dtype(*floats, *jax.tree.leaves((student, teacher)))
    flat = lambda x: None if x is None else x.astype(dtype).reshape(-1)
    temperature, teacher_temperature = flat(temperature), flat(teacher_temperature)

    if mask is not None:
        known = lambda x: None if x is None else jnp.where(mask, x, 1)
        temperature, teacher_temperature = (
            known(temperature),
            known(teacher_temperature),
        )
    weight = _weight(weights, mask, shape, dtype)
    labels = None if labels is None else _labels(labels, mask, shape, columns)
    term_weights = _term_weights(
        _normalized(weight, reduction, normalizer),
        temperature if t_squared else None,
        labels,
        vocab_size=columns,
        alpha=check.scalar("alpha", alpha, 0, 1),
        label_smoothing=check.scalar("label_smoothing", label_smoothing, 0, 1),
        z_loss=check.scalar("z_loss", z_loss, 0),
        statistics=statistics,
    )
    if mask is not None:
        term_weights = jax.tree.map(lambda w: zero_unless(mask, w), term_weights)
    operands = Operands(
        student, teacher, term_weights, temperature, teacher_temperature, labels, mask
    )
    spec = Spec(divergence, vocab, dtype, reduction != "none", statistics, tile)
    if axis_name is not None:
        _check_slices(axis_name, operands)
    return Problem(spec, operands, weight, label_smoothing, shape)


def _source(name, x) -> tuple[Source, tuple[int, ...]]:
    """The source with its tokens flattened, and their shape."""
    if isinstance(x, LinearHead):
        hidden = check.float_array(f"{name}.hidden", x.hidden)
        kernel = check.float_array(f"{name}.kernel", x.kernel)
        if hidden.ndim == 0 or kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
            raise ValueError(
                f"`{name}.hidden` must be [..., hidden] and `{name}.kernel` [hidden, "
                f"vocab], got {hidden.shape} and {kernel.shape}."
            )
        bias = x.bias
        if bias is not None:
            bias = check.float_array(f"{name}.bias", bias)
            check.of_shape(f"{name}.bias", bias, kernel.shape[1:], "the shape [vocab]")
        x = dataclasses.replace(x, hidden=hidden, kernel=kernel, bias=bias)
        first = hidden
    elif isinstance(x, SparseTeacher):
        if name == "student":
            raise TypeError(
                "`student` must be logits or a LinearHead, got SparseTeacher."
            )
        indices = check.int_array(f"{name}.indices", x.indices)
        log_probs = check.float_array(f"{name}.log_probs", x.log_probs)
        if indices.ndim == 0 or indices.shape != log_probs.shape:
            raise ValueError(
                f"`{name}.indices` and `{name}.log_probs` must both be [..., k], got "
                f"{indices.shape} and {log_probs.shape}."
            )
        if indices.shape[-1] == 0:
            raise ValueError(
                f"`{name}.indices` must list a column at least, got k = 0."
            )
        x = dataclasses.replace(x, indices=indices, log_probs=log_probs)
        first = indices
    else:
        first = check.float_array(name, x)
        if first.ndim == 0:
            raise ValueError(f"`{name}` must be logits [..., vocab], got a scalar.")
        x = Logits(first)
    if x.width == 0:
        raise ValueError(f"`{name}` must have a vocabulary of at least 1, got 0.")
    return x.map_tokens(lambda x: x.reshape(-1, x.shape[-1])), first.shape[:-1]


def _vocabulary(vocab_size, student, teacher, axis_name) -> Vocabulary:
    if axis_name is None:
        return Vocabulary.whole(_columns(vocab_size, student, teacher))
    if teacher.width not in (None, student.width):
        raise ValueError(
            "`student` and `teacher` must hold slices of the same vocabulary on each "
            f"device of axis {axis_name!r}, got {student.width} and {teacher.width} "
            "columns."
        )
    if vocab_size is not None:
        vocab_size = check.positive_int("vocab_size", vocab_size)
    vocab = Vocabulary.slice_of(axis_name, student.width, vocab_size)
    if vocab.size > vocab.width * vocab.shards:
        raise ValueError(
            f"`vocab_size` must be at most the {vocab.width * vocab.shards} columns of "
            f"all devices of axis {axis_name!r}, got {vocab_size}."
        )
    return vocab


def _check_slices(axis_name, operands):
    """That just the vocabulary is spread over the axis."""
    slices = {"student": operands.student, "teacher": operands.teacher}
    for name, source in slices.items():
        if source.width is not None and axis_name not in varying_axes(source.columns):
            raise ValueError(
                f"`{name}` must hold a slice of the vocabulary on each device of axis "
                f"{axis_name!r}, got the same columns on all of them."
            )
    replicated = {
        "where": operands.mask,
        "labels": operands.labels,
        "temperature": operands.student_temperature,
        "teacher_temperature": operands.teacher_temperature,
        "weights": operands.weights,
    }
    if operands.teacher.width is None:
        replicated["teacher"] = operands.teacher
    for name, arrays in replicated.items():
        if any(axis_name in varying_axes(x) for x in jax.tree.leaves(arrays)):
            raise ValueError(
                f"`{name}` must be the same on all devices of axis {axis_name!r}, over "
                "which only the vocabulary is spread; got an array that varies over it."
            )


def _columns(vocab_size, student, teacher) -> int:
    widths = student.width, teacher.width or student.width
    if vocab_size is None:
        if widths[0] != widths[1]:
            raise ValueError(
                "`student` and `teacher` must have the same vocabulary, got "
                f"{widths[0]} and {widths[1]} columns; with padding columns, pass "
                "`vocab_size`."
            )
        return widths[0]
    vocab_size = check.positive_int("vocab_size", vocab_size)
    if vocab_size > min(widths):
        raise ValueError(
            f"`vocab_size` must be at most the columns of `student`, {widths[0]}, and "
            f"of `teacher`, {widths[1]}, got {vocab_size}."
        )
    return vocab_size


def _check_sparse(divergence, teacher, teacher_temperature, differentiate_teacher):
    if teacher_temperature is not None:
        raise ValueError(
            "`teacher_temperature` must be None with a SparseTeacher, whose "
            f"log-probabilities have theirs already; got {teacher_temperature!r}."
        )
    if differentiate_teacher:
        raise ValueError(
            "`differentiate_teacher` must be False with a SparseTeacher, which is a "
            "constant."
        )
    check_tail(divergence, teacher)


def _mask(where, shape):
    mask = jnp.asarray(where)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"`where` must be bool, got {mask.dtype.name}.")
    return check.of_shape("where", mask, shape, "the batch shape").reshape(-1)


def _weight(weights, mask, shape, dtype):
    weight = jnp.ones(shape, dtype)
    if weights is not None:
        weight = check.of_shape("weights", weights, shape, "the batch shape").astype(
            dtype
        )
    weight = weight.reshape(-1)
    return weight if mask is None else zero_unless(mask, weight)


def _labels(labels, mask, shape, vocab_size):
    labels = check.int_array("labels", labels)
    check.of_shape("labels", labels, shape, "the batch shape")
    if check.is_known(labels) and check.is_known(mask):
        known = np.asarray(labels).reshape(-1)
        bad = (known != IGNORED_LABEL) & ((known < 0) | (known >= vocab_size))
        bad &= True if mask is None else np.asarray(mask)
        if bad.any():
            raise ValueError(
                f"`labels` must be in [0, {vocab_size}), or {IGNORED_LABEL} for no "
                f"label, got {known[bad][0]}."
            )
    return labels.reshape(-1).astype(jnp.int32)


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
        total = check.scalar("normalizer", normalizer, 0, positive=True)
        total = jax.lax.stop_gradient(jnp.asarray(total, weight.dtype))
    # No weight at all: a loss of 0, with no gradient.
    return zero_unless(total != 0, weight / jnp.where(total != 0, total, 1))


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
    has_cross_entropy = statistics or check.is_traced(alpha) or alpha != 1
    if labels is None and not check.is_traced(alpha) and alpha != 1:
        raise ValueError(f"`alpha` must be 1 without `labels`, got {alpha}.")
    alpha, smoothing, z_weight = (
        jax.lax.stop_gradient(jnp.asarray(x, weight.dtype))
        for x in (alpha, label_smoothing, z_loss)
    )
    # A term with factor 0 is absent, even where it is infinite.
    times = lambda weight, factor: zero_unless(factor != 0, weight * factor)
    divergence = times(weight, alpha)
    if temperature is not None:
        # A token without weight may hold NaN: keep its divergence off temperature's
        # gradient.
        squared = temperature * temperature
        divergence *= jnp.where(weight != 0, squared, jax.lax.stop_gradient(squared))
    label = uniform = lse_squared = None
    if labels is not None and has_cross_entropy:
        valid = (labels >= 0) & (labels < vocab_size)
        label = zero_unless(labels != IGNORED_LABEL, times(weight, 1 - alpha))
        # Under `jit` a label out of range can not raise: it makes the loss NaN.
        label = jnp.where(valid | (labels == IGNORED_LABEL), label, jnp.nan)
        if check.is_traced(label_smoothing) or label_smoothing != 0:
            label, uniform = times(label, 1 - smoothing), times(label, smoothing)
    if check.is_traced(z_loss) or z_loss != 0:
        lse_squared = times(weight, z_weight)
    return Terms(divergence, label, uniform, lse_squared)


def check_divergence(divergence: Any, vocab_size: int) -> None:
    """That it is a pure elementwise function, and a static argument."""
    name = "`divergence`"
    if isinstance(divergence, type):
        made = f"{divergence.__name__}()"
        raise TypeError(f"{name} must be an instance, such as {made}, got the class.")
    if not callable(divergence):
        raise TypeError(f"{name} must be callable, got {divergence!r}.")
    if type(divergence).__module__ == ForwardKL.__module__:
        return
    if not isinstance(divergence, Hashable):
        raise TypeError(f"{name} must be hashable, got {divergence!r}.")
    arg = jax.ShapeDtypeStruct((2, vocab_size), jnp.float32)
    jaxpr = jax.make_jaxpr(divergence)(arg, arg)
    if any(map(check.is_traced, jaxpr.consts)):
        raise ValueError(
            f"{name} must not close over traced values, as {divergence!r} does: make "
            "them Python numbers."
        )
    out = jaxpr.out_avals
    if [(x.shape, x.dtype) for x in out] != [(arg.shape, arg.dtype)]:
        got = ", ".join(f"{x.dtype.name}{list(x.shape)}" for x in out)
        raise ValueError(
            f"{name} must be elementwise: of two {arg.dtype.name}{list(arg.shape)} it "
            f"must make one, got {got}."
        )
