"""A teacher's list, checked beside the other arguments of a loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._divergence.catalogue import Divergence, ForwardKL, is_catalogued
from .._divergence.parameters import with_numbers
from .._source.sparse_teacher import ListSource, SparseTeacher
from .._util import checks as check


_SAME = 1e-3  # the relative difference of temperatures that are the same
ABSENT = object()  # a temperature that is not given, where None is 1


def as_teacher(
    given: SparseTeacher,
    source: ListSource,
    divergence: Divergence,
    vocab_size: int,
    mask: jax.Array | None,
    *,
    temperature: Any,
    teacher_temperature: Any,
    differentiate: bool,
) -> ListSource:
    """The list of `source`, `[B]`, once its values fit the other arguments of a loss.

    The temperatures are checked, and None for exactly 1; that of the teacher is
    `ABSENT` if it is not given. Raises `ValueError` where values do not fit, or makes a
    row NaN if they are traced. Tokens outside `mask`, `[B]`, may hold anything.
    """
    if differentiate:
        raise ValueError(
            "`differentiate_teacher` must be False with a SparseTeacher, which is a "
            "constant."
        )
    is_other = _has_other_temperature(given, temperature, teacher_temperature, mask)
    source = dataclasses.replace(source, is_row=_is_row(source.tail, divergence))
    return source.with_checked_values(vocab_size, mask, is_other)


def _is_row(tail: str, divergence: Divergence) -> bool:
    r"""Whether list and rest are compared as a row of few outcomes, once the divergence
    is known to have a meaning on the tail.

    With `"renormalize"` the unlisted columns are one outcome too, as $p = 0$ and
    $f(0, q) = q\,f(0, 1)$: divergences are homogeneous of degree 1. A user's function
    need not be. With `"uniform"`, each of them has a probability of its own.
    """
    _check_tail(tail, divergence)
    if tail == "renormalize":
        return is_catalogued(divergence)
    return tail != "uniform"


def _has_other_temperature(
    given: SparseTeacher, temperature: Any, teacher_temperature: Any, mask: Any
) -> Any:
    """Whether a token's list was made at another temperature than the loss has, `[B]`.

    Raises `ValueError` if that is known.
    """
    is_given = teacher_temperature is not ABSENT
    name = "teacher_temperature" if is_given else "temperature"
    of_loss = teacher_temperature if is_given else temperature
    of_loss = 1.0 if of_loss is None else of_loss
    of_list: Any = given.temperature
    if of_list is None:
        if is_given:
            raise ValueError(
                "`teacher_temperature` must be None with a SparseTeacher whose "
                "`temperature` is not known: its log-probabilities are at their own "
                "temperature already. Pass SparseTeacher(…, temperature=…) to compare "
                f"the two; got {of_loss!r}."
            )
        return False
    shape = np.shape(given.log_probs)[:-1]
    if not check.is_number(of_list):
        of_list = check.temperature("teacher.temperature", of_list, shape)
    both = of_list, of_loss
    if all(map(check.is_known, both)) and check.is_known(mask):
        x, y = (np.broadcast_to(np.asarray(x, np.float64), shape) for x in both)
        other = (np.abs(x - y) > _SAME * np.abs(y)).reshape(-1)
        if mask is not None:
            other &= np.asarray(mask)
        if other.any():
            first = lambda x: f"{x.reshape(-1)[other][0]:g}"
            raise ValueError(
                f"`{name}` must be the temperature of the SparseTeacher, {first(x)}, "
                f"got {first(y)}: make the list at the temperature of the loss, or "
                "pass `teacher_temperature`, and another `temperature` for the student "
                "alone."
            )
        return False
    x, y = (jnp.asarray(x, jnp.float32) for x in both)
    other = jnp.broadcast_to(jnp.abs(x - y) > _SAME * jnp.abs(y), shape).reshape(-1)
    return other if mask is None else other & mask


def _check_tail(tail: str, divergence: Divergence) -> None:
    """Checks that the divergence has a meaning on the tail."""
    is_forward_kl = isinstance(divergence, ForwardKL) and is_catalogued(divergence)
    if tail == "drop" and not is_forward_kl:
        raise ValueError(
            f'`divergence` must be ForwardKL() with tail="drop", got {divergence!r}.'
        )
    if tail != "renormalize":
        return
    with jax.ensure_compile_time_eval():
        # Arrays are not known. They most often hold no end of their interval.
        f = with_numbers(divergence)
        f = f(jnp.full((1, 1), -jnp.inf), jnp.log(jnp.full((1, 1), 0.5)))
        finite = bool(jnp.isfinite(f).all())
    if not finite:
        raise ValueError(
            f"`divergence` {divergence!r} is not finite where p = 0, as it is outside "
            'the list with tail="renormalize". Take tail="bucket" or "uniform", or a '
            "divergence that is finite there, such as ForwardKL, SkewForwardKL, "
            "JensenShannon or TotalVariation."
        )
