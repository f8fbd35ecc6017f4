"""The divergence of the student from a teacher, column by column."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._divergence.catalogue import Divergence
from .._divergence.parameters import join
from .columns import Columns, Row, SumExp
from .pair import compare_columns, needs_reverse_sums, Pair, sums_of_slopes
from .row_sums import Paired
from .term import d_logits, Gradients, Part, Term


STUDENT, TEACHER = Row("student"), Row("teacher")


@dataclasses.dataclass(frozen=True)
class Comparison(Term):
    """A divergence from a teacher, at temperatures of their own."""

    has_columns: ClassVar[bool] = True  # whether it is one of logits of all columns

    teacher: Any  # Source
    parameters: tuple[Any, ...]  # those of the divergence that are arrays, [B] each
    temperature: Any = None  # of the teacher, [B]; None: 1, or the student's
    divergence: Divergence = dataclasses.field(
        kw_only=True, metadata={"static": True}
    )  # but for its arrays
    # Whether the teacher has the temperature of the student.
    same_temperature: bool = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def whole_divergence(self) -> Divergence:
        """The divergence with its arrays."""
        return join(self.divergence, self.parameters)

    def whole_flags(self):
        flags = jax.tree.map(lambda _: False, self)
        return dataclasses.replace(flags, weight=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseComparison(Comparison):
    """One of two rows of all columns."""

    def statistics(self, c):
        reverse = needs_reverse_sums(self.whole_divergence)
        paired = Paired(STUDENT, TEACHER, self.same_temperature, reverse)
        return [SumExp(STUDENT), SumExp(TEACHER), paired]

    def pair(self, c: Columns) -> Pair:
        _, _, paired = self.statistics(c)
        models = c.model(TEACHER), c.model(STUDENT)
        return Pair(*models, c.rows.sums[paired], self.same_temperature)

    def slope_sums(self, c):
        return sums_of_slopes(self.whole_divergence, self.pair(c), c.vocab)

    def finish(self, c, known, *, recompute):
        pair = self.pair(c)
        compared = compare_columns(
            self.whole_divergence, pair, c.vocab, known, recompute=recompute
        )
        p, q = pair.softmaxes()
        T, T_teacher = c.temperatures["student"], c.temperatures["teacher"]
        d_t, d_T_teacher = d_logits(self.weight, compared.d_teacher, p, T_teacher)
        d_s, d_T = d_logits(self.weight, compared.d_student, q, T)
        if self.same_temperature:
            d_T, d_T_teacher = jax.tree.map(jnp.add, d_T, d_T_teacher), None
        gradients = Gradients(
            {"student": d_s, "teacher": d_t}, {"student": d_T, "teacher": d_T_teacher}
        )
        return Part(compared.divergence, gradients, p.lse + q.lse)

    def value(self, of_all, known, sums):
        del of_all, known
        return sums
