"""The terms of a loss, each with its weights."""

from typing import Any

from .._divergence.catalogue import Divergence
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


def comparison(
    folded: Folded,
    student: Source,
    teacher: Source,
    divergence: Divergence,
    *,
    same_temperature: bool,
    is_only_term: bool,
) -> Comparison:
    """The term of a teacher, whose divergence is given without its arrays."""
    arguments: dict[str, Any] = dict(
        weight=folded.term_weights.divergence,
        teacher=teacher,
        parameters=folded.parameters,
        temperature=folded.teacher_temperature,
        divergence=divergence,
        same_temperature=same_temperature,
    )
    if not (isinstance(teacher, ListSource) and teacher.is_row):
        return DenseComparison(**arguments)
    is_own = student.kind == "logits" and is_only_term
    d_dtype = student.vocab_array.dtype if is_own else None
    return ListComparison(**arguments, d_dtype=d_dtype)
