"""Sums over blocks of columns add up to those of the row, once they are moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkl._engine.row_stats import (
    Below,
    CERTAIN,
    Columns,
    merged,
    Paired,
    Present,
    Row,
    RowStats,
    Shifted,
    SumExp,
)
from jaxkl._math.vocabulary import Vocabulary

from .helpers import assert_close


STUDENT, TEACHER, AT_1 = Row("student"), Row("teacher"), Row("student", at_1=True)
PAIRED = Paired(STUDENT, TEACHER, same_temperature=False, reverse=True)
STATISTICS = [
    *map(SumExp, (STUDENT, TEACHER, AT_1, Row("teacher", at_1=True))),
    *(x(row) for x in (Below, Shifted, Present) for row in (STUDENT, AT_1)),
    PAIRED,
]


def row_stats(logits, temperatures, maxima=None):
    if maxima is None:
        maxima = {name: jnp.max(x, axis=-1) for name, x in logits.items()}
    vocab = Vocabulary.whole(logits["student"].shape[-1])
    c = Columns(vocab, temperatures, logits, RowStats(maxima, {}))
    return RowStats(maxima, {x: x.of(c) for x in STATISTICS})


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
    logits = {
        name: jnp.asarray(x, jnp.float32)
        for name, x in (("student", student), ("teacher", teacher))
    }
    temperatures = {"student": jnp.full(30, 0.8), "teacher": jnp.full(30, 1.5)}
    whole = row_stats(logits, temperatures)
    blocks = [
        row_stats({name: x[:, at] for name, x in logits.items()}, temperatures)
        for at in (slice(0, 4), slice(4, 11))
    ]
    total = merged(*blocks, temperatures)
    for name, largest in whole.maxima.items():
        assert jnp.array_equal(total.maxima[name], largest)
    # What is below the top matters where one column is certain.
    certain = {row: whole.sums[SumExp(row)] * CERTAIN < 1 for row in (STUDENT, AT_1)}
    assert all(x.any() for x in certain.values()) or scale == 1.0

    def kept(sums):
        x = sums[PAIRED]
        below = {
            Below(row): jnp.where(is_certain, sums[Below(row)], 0)
            for row, is_certain in certain.items()
        }
        reverse = x.reverse._replace(
            prob_below=jnp.where(certain[STUDENT], x.reverse.prob_below, 0),
            log_ratio_below=jnp.where(certain[STUDENT], x.reverse.log_ratio_below, 0),
        )
        return sums | below | {PAIRED: x._replace(reverse=reverse)}

    leaves = jax.tree.leaves(kept(total.sums)), jax.tree.leaves(kept(whole.sums))
    for part, expected in zip(*leaves, strict=True):
        assert jnp.isfinite(expected).all()
        error = jnp.abs(part - expected) / (jnp.abs(expected) + 1)
        assert float(error.max()) < 2e-5
    for name in (SumExp(STUDENT), SumExp(TEACHER)):
        assert_close(total.sums[name], whole.sums[name], 2e-6, repr(name))
    difference = (x.sums[PAIRED].difference for x in (total, whole))
    assert_close(*difference, 2e-6, "difference")


@pytest.mark.parametrize("off", [-1e-5, 0.0, 1e-5])
def test_a_maximum_that_was_rounded_otherwise(off):
    """The certain column is told from the others by a margin, and not by z = 0."""
    logits = {"student": jnp.array([[30.0, 11.0, 10.0, -jnp.inf]])}
    logits["teacher"] = logits["student"]
    maxima = {name: x[:, 0] + off for name, x in logits.items()}
    stats = row_stats(logits, dict.fromkeys(logits), maxima)
    expected = np.exp(-19 - off) + np.exp(-20 - off)
    assert_close(stats.sums[Below(STUDENT)], np.array([expected]), 3e-6)
