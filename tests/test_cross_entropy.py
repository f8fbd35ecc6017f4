"""What `cross_entropy` alone has: test_values.py and its like have the rest."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from jaxkl import cross_entropy, LinearHead

from .cases import rarely
from .helpers import assert_close
from .registry import LOSSES, pull_back, put_tokens
from .sources import expected_cross_entropy, make_head


@pytest.mark.parametrize("plan", [None, *rarely("lean")])
def test_a_nearly_certain_label(plan):
    """The gradient by the label's logit is the sum of the others', 1e-6 here."""
    s = np.float32([[0, -14.5, -15.2, -30], [-30, -15.2, -14.5, 0], [3, 3, -20, -30]])
    labels = np.array([0, 0, 1])
    f = lambda s: cross_entropy(
        LinearHead(s, np.eye(4, dtype=np.float32)), labels, reduction="none", plan=plan
    )
    value, pull = jax.vjp(jax.jit(f), s)
    (gradient,) = pull(jnp.ones(3))
    expected = expected_cross_entropy(s, labels, reduction="none")
    for i in range(3):
        assert_close(value[i], expected.loss[i], 1e-6)
        assert_close(gradient[i], expected.student[i], 1e-6)


def test_tokens_without_a_label_may_hold_anything(rng):
    loss = LOSSES["cross_entropy of head"]
    batch = loss.make(rng, (3,), 11)
    batch = batch.map(lambda x: put_tokens(x, slice(None), np.nan), "student")
    batch = batch._replace(others=dict(labels=np.full(3, -100)))
    found = pull_back(loss, batch, np.float32(1))
    assert not any(x.any() for x in jax.tree.leaves(found))


def test_three_products_with_the_gradient(rng):
    student, labels = make_head(rng, (6,), 5, 37, bias=True), np.zeros(6, int)
    program = lambda f: jax.jit(f).lower(student).as_text()
    count = lambda f: len(re.findall("stablehlo.dot_general", program(f)))
    loss = lambda student: cross_entropy(student, labels)
    assert count(loss) == 1
    assert count(jax.grad(loss)) == 3


def test_labels_that_differ_over_the_vocabulary_axis():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    local = ft.partial(cross_entropy, axis_name="model")
    specs = P(None, "model"), P("model")
    spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match="`labels` must be the same on all devices"):
        jax.eval_shape(spread, jnp.zeros((2, 8)), jnp.zeros(8, jnp.int32))


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(labels=np.full(3, 1)), ValueError, "`labels` must have the batch shape"),
        (dict(labels=np.full(2, 4)), ValueError, r"be in \[0, 4\), or -100 for no"),
        (dict(labels=np.zeros(2)), TypeError, "`labels` must be integers, got float"),
        (dict(labels=None), TypeError, "`labels` must be an array of integers"),
        (dict(reduction="avg"), ValueError, "`reduction` must be one of"),
        (dict(label_smoothing=1.5), ValueError, "`label_smoothing` must be in"),
        (dict(vocab_size=5), ValueError, "columns of `student`, 4, got 5"),
        (dict(mask=None), TypeError, "did you mean `where`"),
        (dict(student=3.0), ValueError, "`student` must be logits"),
    ],
)
def test_bad_arguments(arguments, error, match):
    good = dict(student=jnp.zeros((2, 4)), labels=jnp.array([0, -100]))
    with pytest.raises(error, match=match):
        cross_entropy(**good | arguments)


def test_a_traced_label_that_is_out_of_range_is_nan():
    f = jax.jit(ft.partial(cross_entropy, reduction="none"))
    is_bad = np.isnan(f(np.zeros((2, 4), np.float32), np.array([0, 4])))
    np.testing.assert_array_equal(is_bad, [False, True])
