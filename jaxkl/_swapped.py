"""A warning for student and teacher in the wrong order.

A divergence cannot tell them apart, and the gradient of a constant teacher is 0. But a
user who differentiates the teacher, and not the student, has most likely swapped them.
"""

import collections
import functools as ft
import sys
import warnings

import jax
from jax.custom_derivatives import SymbolicZero

from . import _checks as check
from ._sources import Source


def as_constant(student: Source, teacher: Source) -> Source:
    """The teacher as a constant.

    It warns if the teacher is differentiated and the student is not: now, or when the
    program that is being traced is differentiated later.
    """
    if not any(map(check.is_traced, jax.tree.leaves(teacher))):
        return teacher
    return jax.lax.stop_gradient(_watched(_line_of_user(), student, teacher))


# It is a `custom_jvp` because the losses of `reference` have a forward mode.
@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _watched(line, student, teacher):
    del line, student
    return teacher


def _watched_jvp(line, primals, tangents):
    d_student, d_teacher = tangents
    if _is_differentiated(d_teacher) and not _is_differentiated(d_student):
        _warn(*line)
    return primals[1], d_teacher


_watched.defjvp(_watched_jvp, symbolic_zeros=True)


def _is_differentiated(tangents):
    leaves = jax.tree.leaves(tangents)
    return any(
        not isinstance(x, SymbolicZero) and x.dtype != jax.dtypes.float0 for x in leaves
    )


_warned = collections.defaultdict(dict)  # a registry for each file: a line warns once


def _warn(file, line):
    warnings.warn_explicit(
        "`teacher` is differentiated and `student` is not, so that the gradient is 0: "
        "the student comes first, distillation_loss(student, teacher). If that is so, "
        "pass jax.lax.stop_gradient(teacher), or differentiate_teacher=True for the "
        "teacher's gradient.",
        UserWarning,
        file,
        line,
        registry=_warned[file],
    )


def _line_of_user():
    """File and line that called jaxkl. A warning may come long after the trace."""
    frame = sys._getframe()
    while frame.f_globals.get("__package__") == __package__ and frame.f_back:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
