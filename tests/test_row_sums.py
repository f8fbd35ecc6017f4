"""Sums over blocks of columns add up to those of the row, once they are moved."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkl._engine import student_terms
from jaxkl._engine.operands import LossTerms
from jaxkl._engine.row_sums import (
    CERTAIN,
    Maxima,
    merged,
    pair_sums,
    RowStats,
    RowSums,
    sum_exp,
    Unlisted,
)
from jaxkl._math.softmax import Model, SoftmaxStats

from .helpers import assert_close


def row_sums(teacher, student, maxima, temperatures):
    u, z = (
        Model(x, SoftmaxStats(largest, temperature))
        for x, largest, temperature in zip(
            (teacher, student),
            (maxima.teacher, maxima.student),
            temperatures,
            strict=True,
        )
    )
    of_pair = pair_sums(u, z, same_temperature=False, reverse=True)
    alone = Model(student, SoftmaxStats(maxima.student))
    at_1 = sum_exp(alone)
    return RowSums(
        student=sum_exp(z),
        teacher=sum_exp(u),
        student_at_1=at_1,
        teacher_at_1=sum_exp(Model(teacher, SoftmaxStats(maxima.teacher))),
        unlisted=Unlisted(sum_exp(z), jnp.sum(jnp.exp(z.shifted()) * z.shifted(), -1)),
        **of_pair,
        **student_terms.sums(LossTerms(None, entropy=at_1), alone),
    )


def maxima_of(teacher, student):
    of_student, of_teacher = (jnp.max(x, axis=-1) for x in (student, teacher))
    return Maxima(of_student, of_teacher, unlisted=of_student)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("noise", [1e-3, 3.0])
def test_merged(rng, scale, noise):
    """Of rows whose largest column is in the first block, the second, or both."""
    student = scale * rng.normal(size=(30, 11))
    teacher = student + noise * rng.normal(size=student.shape)
    # Columns that are absent from one model or both, and a block without any
    student[3, 2] = student[4, 7] = teacher[4, 7] = teacher[5, 1] = -jnp.inf
    student[6, :4] = teacher[6, :4] = -jnp.inf
    student[7, 1] = student[7, 8] = 50.0
    student, teacher = (jnp.asarray(x, jnp.float32) for x in (student, teacher))
    temperatures = jnp.full(30, 1.5), jnp.full(30, 0.8)
    maxima = maxima_of(teacher, student)
    whole = row_sums(teacher, student, maxima, temperatures)
    stats = []
    for start, stop in itertools.pairwise((0, 4, 11)):
        block = teacher[:, start:stop], student[:, start:stop]
        own = maxima_of(*block)
        stats.append(RowStats(own, row_sums(*block, own, temperatures)))
    together, total = merged(*stats, temperatures[1], temperatures[0])
    assert all(jnp.array_equal(x, y) for x, y in zip(together, maxima, strict=True))
    # What is below the top matters where one column is certain.
    certain_at_1, certain = (
        x * CERTAIN < 1 for x in (whole.student_at_1, whole.student)
    )
    assert certain_at_1.any() and certain.any() or scale == 1.0
    kept = lambda sums: sums._replace(
        below=jnp.where(certain_at_1, sums.below, 0),
        reverse=sums.reverse._replace(
            prob_below=jnp.where(certain, sums.reverse.prob_below, 0),
            log_ratio_below=jnp.where(certain, sums.reverse.log_ratio_below, 0),
        ),
    )
    leaves = jax.tree.leaves(kept(total)), jax.tree.leaves(kept(whole))
    for part, expected in zip(*leaves, strict=True):
        assert jnp.isfinite(expected).all()
        error = jnp.abs(part - expected) / (jnp.abs(expected) + 1)
        assert float(error.max()) < 2e-5
    for name in ("student", "teacher", "difference"):
        assert_close(getattr(total, name), getattr(whole, name), 2e-6, name)


@pytest.mark.parametrize("off", [-1e-5, 0.0, 1e-5])
def test_a_maximum_that_was_rounded_otherwise(off):
    """The certain column is told from the others by a margin, and not by z = 0."""
    student = jnp.array([[30.0, 11.0, 10.0, -jnp.inf]])
    q = Model(student, SoftmaxStats(student[:, 0] + off))
    below = student_terms.sums(LossTerms(None, entropy=jnp.ones(1)), q)["below"]
    expected = np.exp(-19 - off) + np.exp(-20 - off)
    assert_close(below, np.array([expected]), 3e-6)
