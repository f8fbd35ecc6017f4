"""The tail "conditional": both models, given that the outcome is listed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import jaxkl
from jaxkl import distillation_loss, SparseTeacher, top_k_teacher

from . import oracle
from .cases import (
    ALL,
    assert_gradient,
    assert_matches,
    assert_source_gradient,
    evaluate,
    FORWARD,
    JENSEN_SHANNON,
    over,
    rarely,
    REVERSE,
    rounded,
)
from .helpers import assert_close
from .sources import (
    exact_logits,
    expected_of,
    make_head,
    make_list,
    make_models,
    per_token,
)


conditional = partial(SparseTeacher, tail="conditional")


@over("reverse", slow=[x for x in ALL if x != "reverse"])
@pytest.mark.parametrize("source", ["head, conditional", *rarely("conditional")])
def test_every_argument_at_once(rng, source, divergence, reference):
    models = make_models(rng, source, (3, 5), 11, pad=(3, 0))
    arrays = per_token(rng, (3, 5), "temperature", "weights", "where", "labels")
    numbers = dict(alpha=0.3, label_smoothing=0.1, z_loss=1e-2, vocab_size=11, tile=4)
    cotangent = rng.normal(size=(3, 5)).astype(np.float32)
    more = dict(reduction="none", cotangent=cotangent)
    assert_matches(*models, (divergence, reference), **more, **arrays, **numbers)


@pytest.mark.slow
def test_a_cotangent_for_each_token(rng):
    models = make_models(rng, "head, conditional", (13,), 11)
    cotangent = jnp.asarray(rng.normal(size=13), jnp.float32)
    more = dict(reduction="none", cotangent=cotangent, tile=4)
    assert_matches(*models, JENSEN_SHANNON, **more)


@pytest.mark.parametrize("T", [2.5, *rarely(1.0)])
def test_is_the_softmax_of_the_top_k_logits_on_either_side(rng, T):
    """As tunix, MaxText and NeMo-RL have it."""
    s, t = rounded(rng, (6, 40)), rounded(rng, (6, 40), scale=2.0)
    values, columns = jax.lax.top_k(t, 5)

    def theirs(s):
        log_p = jax.nn.log_softmax(values / T)
        log_q = jax.nn.log_softmax(jnp.take_along_axis(s, columns, -1) / T)
        return T * T * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    mine = lambda s, teacher: distillation_loss(s, teacher, temperature=T)
    teacher = conditional(columns, values / T)

    @jax.jit
    def run(s, t, teacher):
        listed = top_k_teacher(t, 5, temperature=T, tail="conditional")
        return *jax.value_and_grad(mine)(s, teacher), mine(s, listed)

    value, grad, of_listed = run(s, t, teacher)
    want, wanted = jax.jit(jax.value_and_grad(theirs))(s)
    assert_close(value, want, 5e-6)
    assert_close(grad, wanted, 1e-5)
    assert_close(of_listed, want, 5e-6)


@pytest.mark.parametrize("name", ["forward", *rarely("js", "reverse", "user")])
def test_columns_outside_the_list_have_no_part(rng, name):
    """Even where they have all the mass: the list has a maximum of its own."""
    teacher = make_list(rng, (4,), 11, 4, "conditional")
    s = rounded(rng, (4, 11))
    listed = np.zeros((4, 11), bool)
    for row, columns in zip(listed, np.asarray(teacher.indices), strict=True):
        row[columns[columns >= 0]] = True
    values = []
    for junk in (0.0, 300.0, -np.inf):
        other = jnp.where(listed, s, junk)
        value, grads = assert_matches(other, teacher, ALL[name], temperature=1.5)
        assert not grads["student"][~listed].any()
        values.append(value)
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1e-4, *rarely(1e-1)])
@over("forward", slow=["reverse", "js"])
def test_near_student_and_teacher_keep_their_digits(rng, noise, divergence, reference):
    t = rounded(rng, (8, 50), scale=3.0)
    s = t + rounded(rng, (8, 50), scale=noise)
    values, columns = jax.lax.top_k(t, 9)
    teacher = conditional(columns, values)
    value, grads = evaluate(s, teacher, divergence=divergence, reduction="none")
    expected = expected_of(s, teacher, divergence=reference, reduction="none")
    np.testing.assert_allclose(value, np.float64(expected.loss), rtol=2e-3)
    assert_close(grads["student"], expected.student, 1e-4)


def test_equal_models_are_exactly_equal(rng):
    t = rounded(rng, (5, 20))
    values, columns = jax.lax.top_k(t, 6)
    value, grads = evaluate(t, conditional(columns, values))
    assert value == 0 and not grads["student"].any()


@pytest.mark.parametrize("name", ["forward", *rarely("reverse", "js")])
def test_every_column_listed_is_the_dense_loss(rng, name):
    s, t = rounded(rng, (5, 700)), rounded(rng, (5, 700), scale=2.0)
    order = jnp.asarray(np.argsort(rng.random((5, 700)), -1))
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(t), order, -1)
    divergence, reference = ALL[name]
    value, grads = evaluate(s, conditional(order, log_probs), divergence=divergence)
    expected = oracle.distillation_loss(s, t, divergence=reference)
    assert_close(value, expected.loss, 5e-6)
    assert_close(grads["student"], expected.student, 1e-5)


def test_one_column_is_certain_in_both(rng):
    teacher = conditional(jnp.array([[3], [0]]), jnp.full((2, 1), -2.0))
    value, grads = evaluate(rounded(rng, (2, 7)), teacher)
    assert value == 0 and not grads["student"].any()


@pytest.mark.slow
def test_repeated_columns_add_up(rng):
    s = rounded(rng, (1, 7))
    log = lambda *p: jnp.log(jnp.array([p]))
    split = conditional(jnp.array([[2, 5, -1, 2]]), log(0.1, 0.5, 0.2, 0.3))
    whole = conditional(jnp.array([[2, 5]]), log(0.4, 0.5))
    for x, y in zip(
        *(jax.tree.leaves(evaluate(s, t)) for t in (split, whole)), strict=True
    ):
        assert_close(x, y, 1e-6)


def test_listed_columns_without_mass(rng):
    """Of a column that neither model has, nothing is asked."""
    s = rounded(rng, (2, 7)).at[:, 4].set(-jnp.inf)
    log_probs = jnp.log(jnp.array([[0.5, 0.0, 0.3], [0.5, 0.0, 0.3]]))
    teacher = conditional(jnp.array([[1, 4, 2]] * 2), log_probs)
    more = dict(reduction="none", value_tol=2e-6)
    for pair in (FORWARD, REVERSE):
        assert_matches(s, teacher, pair, **more)
    there = s.at[1, 4].set(0.3)
    assert_matches(there, teacher, FORWARD, **more)
    value, _ = evaluate(there, teacher, divergence=REVERSE[0], reduction="none")
    np.testing.assert_array_equal(np.isinf(value), [False, True])


def test_empty_rows_and_junk_that_where_drops(rng):
    s, teacher = make_models(rng, "conditional", (4,), 11)
    where = jnp.array([True, False, True, False])
    indices = teacher.indices.at[1].set(-1)
    log_probs = teacher.log_probs.at[1].set(-jnp.inf).at[3].set(jnp.nan)
    s = s.at[3].set(jnp.nan)
    _, grads = assert_matches(s, conditional(indices, log_probs), REVERSE, where=where)
    assert not grads["student"][~where].any()


def test_an_empty_list_gives_nothing(rng):
    """Its loss is NaN, and that of the other tokens is not."""
    s, teacher = make_models(rng, "conditional", (3,), 11)
    teacher = conditional(teacher.indices.at[1].set(-1), teacher.log_probs)
    value = distillation_loss(s, teacher, reduction="none")
    np.testing.assert_array_equal(np.isnan(value), [False, True, False])


def test_columns_that_do_not_exist(rng):
    s, teacher = rounded(rng, (4, 13)), make_list(rng, (4,), 11, 4, "conditional")
    wrong = conditional(teacher.indices.at[2, 0].set(11), teacher.log_probs)
    with pytest.raises(ValueError, match=r"`teacher.indices`.*\[0, 11\).*11"):
        distillation_loss(s, wrong, vocab_size=11)
    f = jax.jit(partial(distillation_loss, vocab_size=11, reduction="none"))
    np.testing.assert_array_equal(np.isnan(f(s, wrong)), [False, False, True, False])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float16")])
def test_half_precision(rng, dtype):
    models = make_models(rng, "head, conditional", (9,), 37, dtype)
    assert_matches(*models, FORWARD, temperature=2.0, tile=4)


@pytest.mark.slow
def test_float64(rng):
    with jax.enable_x64(True):
        models = make_models(rng, "conditional", (9,), 37, "float64")
        assert_matches(*models, REVERSE, temperature=2.0)


# Plans and meshes. The columns of a list are in several blocks, and on several devices.


@over("forward", slow=["reverse", "js", "user"])
@pytest.mark.parametrize("way", ["lean", "2x4", *rarely("1x8")])
def test_lists_over_blocks_and_devices(rng, monkeypatch, way, divergence, reference):
    student = make_head(rng, (13,), 5, 300, bias=True, softcap=3.0)
    teacher = make_list(rng, (13,), 300, 9, "conditional")
    counted = dict(labels=jnp.arange(13), where=jnp.arange(13) != 4)
    counted["temperature"] = jnp.asarray(np.linspace(0.5, 3, 13), jnp.float32)
    options = dict(divergence=divergence, alpha=0.7)
    if way == "lean":
        monkeypatch.setattr("jaxkl._engine.plan._columns", lambda *_: 128)
        options |= dict(plan="lean")
    else:
        shape = tuple(map(int, way.split("x")))
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        options |= dict(mesh=mesh, token_axes="data", vocab_axis="model")

    def loss(student, temperature):
        shared = counted | dict(temperature=temperature)
        return jaxkl.distillation_loss_with_metrics(
            student, teacher, **shared, **options
        )

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, metrics), (d_student, d_T) = step(student, counted["temperature"])
    expected = expected_of(student, teacher, divergence=reference, alpha=0.7, **counted)
    assert_close(value, expected.loss, 5e-6)
    assert_source_gradient(student, d_student, expected.student, "student")
    assert_gradient("temperature", d_T, expected, 1e-5)
    s, _ = exact_logits(student)
    wants = oracle.metrics(s, teacher, divergence=reference, **counted)
    for name in oracle.Metrics._fields:
        assert_close(getattr(metrics, name), getattr(wants, name), 1e-5, name)


def test_axis_name(rng):
    s, teacher = make_models(rng, "conditional", (6,), 16)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    local = partial(distillation_loss, axis_name="model", vocab_size=15)
    specs = P(None, "model"), P()
    f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    teacher = conditional(teacher.indices % 15, teacher.log_probs)
    value, grad = jax.jit(jax.value_and_grad(f))(s, teacher)
    expected = expected_of(s, teacher, vocab_size=15)
    assert_close(value, expected.loss, 5e-6)
    assert_close(grad, expected.student, 1e-5)


# Transformations.
