"""A warning for student and teacher in the wrong order.

A divergence cannot tell them apart, and the gradient of a constant teacher is 0. But a
user who differentiates the teacher, and not the student, has most likely swapped them.
"""

import warnings

import jax
from jax.custom_derivatives import SymbolicZero

from .._source.base import Source


def as_constant(student: Source, teacher: Source) -> Source:
    """The teacher as a constant.

    It warns if the teacher is differentiated and the student is not: now, or when the
    program that is being traced is differentiated later.
    """
    return jax.lax.stop_gradient(_watched(student, teacher))


# It is a `custom_jvp` because the losses of `reference` have a forward mode.
@jax.custom_jvp
def _watched(student, teacher):
    del student
    return teacher


def _watched_jvp(primals, tangents):
    of_student, of_teacher = map(_is_differentiated, tangents)
    if of_teacher and not of_student:
        warnings.warn(
            "`teacher` is differentiated and `student` is not, so that the gradient is "
            "0: the student comes first, distillation_loss(student, teacher). If that "
            "is so, pass jax.lax.stop_gradient(teacher), or differentiate_teacher=True "
            "for the teacher's gradient.",
            stacklevel=2,
        )
    return primals[1], tangents[1]


_watched.defjvp(_watched_jvp, symbolic_zeros=True)


def _is_differentiated(tangents):
    leaves = jax.tree.leaves(tangents)
    return any(
        not isinstance(x, SymbolicZero) and x.dtype != jax.dtypes.float0 for x in leaves
    )
