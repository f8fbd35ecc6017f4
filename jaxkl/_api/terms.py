"""The terms of a loss, each with its weights."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from .._divergence.catalogue import Divergence
from .._divergence.parameters import Parameter
from .._engine.comparison import Comparison, DenseComparison
from .._engine.list_comparison import ListComparison
from .._engine.student_terms import Label, LseSquared, StudentTerm, Uniform
from .._source.base import Source
from .._source.list_source import ListSource
from .fold import Folded


def student_terms(folded: Folded, labels: Any, *, at_1: bool) -> list[StudentTerm]:
    """Those of the student alone: at temperature 1, or at that of the loss."""
    weights = folded.term_weights
    terms: list[StudentTerm] = []
    if weights.label is not None:
        terms.append(Label(weights.label, labels, at_1=at_1))
    if weights.uniform is not None:
        terms.append(Uniform(weights.uniform, at_1=at_1))
    if weights.lse_squared is not None:
        terms.append(LseSquared(weights.lse_squared, at_1=at_1))
    return terms


class Compared(NamedTuple):
    """A teacher, and how the student is compared with it."""

    teacher: Source
    is_differentiated: bool
    divergence: Divergence  # without the arrays among its parameters
    parameters: list[Parameter]
    temperature: Any  # None: 1, or the student's
    same_temperature: bool  # as the student's


def comparison(folded: Folded, x: Compared, rounded_to: jnp.dtype | None) -> Comparison:
    """The term of a teacher.

    `rounded_to` is the dtype of the student's logits, if nothing else has a part in
    their gradient.
    """
    arguments: dict[str, Any] = dict(
        weight=folded.term_weights.divergence,
        teacher=x.teacher,
        parameters=folded.parameters,
        temperature=folded.teacher_temperature,
        divergence=x.divergence,
        same_temperature=x.same_temperature,
    )
    if isinstance(x.teacher, ListSource) and x.teacher.is_row:
        return ListComparison(**arguments, d_dtype=rounded_to)
    return DenseComparison(**arguments)
