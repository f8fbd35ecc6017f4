"""The arguments of a distillation loss, each checked and made an array or a source."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks as check
from ._compat import varying_axes
from ._divergences import ForwardKL
from ._linear_head import LinearHead
from ._sources import Logits, Source
from ._sparse import check_tail, SparseTeacher
from ._vocabulary import Vocabulary


IGNORED_LABEL = -100


def as_source(name, x) -> tuple[Source, tuple[int, ...]]:
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
    if not isinstance(x.width, int | None):
        raise ValueError(
            f"`{name}` must have a vocabulary of known size, got {x.width}: only the "
            "number of tokens may be symbolic."
        )
    if x.width == 0:
        raise ValueError(f"`{name}` must have a vocabulary of at least 1, got 0.")
    return x.map_tokens(lambda x: x.reshape(-1, x.shape[-1])), first.shape[:-1]


def vocabulary_of(vocab_size, student, teacher, axis_name) -> Vocabulary:
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


def check_slices(axis_name, operands):
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


def check_sparse(divergence, teacher, teacher_temperature, differentiate_teacher):
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


def per_token(x, shape, dtype):
    """A number, or an array that is a scalar or of that shape, `[B]`. None is kept."""
    if x is None:
        return None
    return jnp.broadcast_to(jnp.asarray(x, dtype), shape).reshape(-1)


def as_mask(where, shape):
    mask = check.array("where", where, "bools")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"`where` must be bool, got {mask.dtype.name}.")
    return check.of_shape("where", mask, shape, "the batch shape").reshape(-1)


def as_labels(given, mask, shape, vocab_size):
    labels = check.int_array("labels", given)
    check.of_shape("labels", labels, shape, "the batch shape")
    if check.is_known(labels) and check.is_known(mask):
        known = np.asarray(labels).reshape(-1)
        bad = (known != IGNORED_LABEL) & ((known < 0) | (known >= vocab_size))
        bad &= True if mask is None else np.asarray(mask)
        if bad.any():
            raise ValueError(
                f"`labels` must be in [0, {vocab_size}), or {IGNORED_LABEL} for no "
                f"label, got {np.asarray(given).reshape(-1)[bad][0]}."
            )
    return labels.reshape(-1)


def check_divergence(
    divergence: Any, vocab: Vocabulary, teacher: Source, is_spread: bool
) -> None:
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
    # It may hold an array of all columns, if these are what it sees.
    is_spread |= vocab.axis_name is not None
    sees_all = teacher.width is not None and not is_spread
    width = vocab.size if sees_all else vocab.size + 1
    arg = jax.ShapeDtypeStruct((2, width), jnp.float32)
    of = f"{arg.dtype.name}{list(arg.shape)}"
    try:
        jaxpr = jax.make_jaxpr(divergence)(arg, arg)
    except (TypeError, ValueError) as error:
        hint = (
            " With a SparseTeacher, or a vocabulary that is spread over devices, it "
            "must not hold an array with an entry a column."
        )
        raise ValueError(
            f"{name} must be elementwise, for arrays of any shape, and {divergence!r} "
            f"fails for two of {of}: {error}{'' if sees_all else hint}"
        ) from error
    if any(map(check.is_traced, jaxpr.consts)):
        raise ValueError(
            f"{name} must not close over traced values, as {divergence!r} does: make "
            "them Python numbers."
        )
    out = jaxpr.out_avals
    if [(x.shape, x.dtype) for x in out] != [(arg.shape, arg.dtype)]:
        got = ", ".join(f"{x.dtype.name}{list(x.shape)}" for x in out)
        raise ValueError(
            f"{name} must be elementwise: of two {of} it must make one, got {got}."
        )
