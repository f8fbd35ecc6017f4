"""A bad value that is known only at run time makes the loss NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference

from . import oracle
from .cases import ALL, over, rarely, rounded


LABELS = jnp.array([0, 4, -100])
WHERE = jnp.array([True, False, True])
BAD = (0.0, -1.0, float("nan"), float("inf"), 1e-7, 1e7)  # temperatures
FUNCTIONS = {
    "plain": jaxkl.distillation_loss,
    "metrics": lambda *a, **kw: jaxkl.distillation_loss_with_metrics(*a, **kw)[0],
    "reference": jaxkl.reference.distillation_loss,
}
plain, *others = FUNCTIONS.values()
over_functions = pytest.mark.parametrize(
    "loss", [plain, *rarely(*others)], ids=FUNCTIONS
)


GOOD = dict(alpha=1.0, label_smoothing=0.0, z_loss=0.0, normalizer=3.0)
BAD_FACTORS = [
    ("alpha", 2.0),
    ("alpha", -0.1),
    ("alpha", np.nan),
    ("label_smoothing", 5.0),
    ("label_smoothing", -0.1),
    ("z_loss", -3.0),
    ("z_loss", np.inf),
    ("normalizer", 0.0),
    ("normalizer", -2.0),
    ("normalizer", np.nan),
]


@over_functions
@pytest.mark.parametrize("labels", [None, LABELS], ids=["alone", "labels"])
def test_factors_out_of_range(rng, loss, labels):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))

    @jax.jit
    @jax.value_and_grad
    def f(s, t, factors):
        return loss(s, t, labels=labels, **factors)

    def check(is_good, **factors):
        factors = {k: jnp.float32(x) for k, x in (GOOD | factors).items()}
        value, grad = f(s, t, factors)
        assert np.isnan(value) == np.isnan(grad).any() != is_good, factors

    check(True)
    check(True, z_loss=0.1)
    check(labels is not None, alpha=0.5, label_smoothing=1.0)
    for name, bad in BAD_FACTORS:
        check(False, **{name: bad})


@over_functions
def test_a_number_of_tokens_out_of_range(rng, loss):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    f = jax.jit(lambda s, t, n: loss(s, t, normalizer=n))
    assert np.isnan(f(s, t, np.int32(0))) and np.isnan(f(s, t, np.int32(-2)))
    np.testing.assert_allclose(f(s, t, np.int32(3)), loss(s, t), rtol=1e-6)


@over_functions
@pytest.mark.parametrize("name", ["normalizer", "z_loss"])
def test_a_python_int_may_need_more_than_32_bits(rng, loss, name):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    value, expected = (loss(s, t, **{name: x}) for x in (5_000_000_000, 5e9))
    np.testing.assert_array_equal(value, expected)
    assert np.isfinite(value)


@pytest.mark.parametrize("loss", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("name", ["temperature", *rarely("teacher_temperature")])
def test_temperature_out_of_range(rng, loss, name):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))

    @jax.jit
    def f(s, t, temperature):
        options = dict(t_squared=False, reduction="none") | {name: temperature}
        return loss(s, t, **options), loss(s, t, where=WHERE, **options)

    expected, _ = f(s, t, jnp.array([1.0, 1.0, 2.0]))
    assert np.isfinite(expected).all()
    for bad in BAD:
        every, kept = f(s, t, jnp.array([1.0, bad, 2.0]))
        np.testing.assert_allclose(every, expected.at[1].set(jnp.nan), rtol=1e-6)
        # The temperature of a dropped token does not matter.
        np.testing.assert_allclose(kept, expected.at[1].set(0), rtol=1e-6)
    mean = jax.jit(lambda s, t, T: loss(s, t, **{name: T}))
    assert all(np.isnan(mean(s, t, jnp.float32(bad))) for bad in BAD)


@pytest.mark.parametrize("squared", [True, *rarely(False)])
def test_gradients_at_a_temperature_out_of_range(rng, squared):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))

    @jax.jit
    def grad(s, t, temperature, where):
        f = lambda s, T: jaxkl.distillation_loss(
            s, t, temperature=T, t_squared=squared, where=where
        )
        return jax.grad(f, (0, 1))(s, temperature)

    for bad in BAD:
        temperature = jnp.array([1.0, bad, 2.0])
        d_s, d_temperature = grad(s, t, temperature, jnp.full(3, True))
        assert np.isnan(d_s[1]).all() and np.isfinite(d_s[::2]).all()
        assert np.isfinite(d_temperature[::2]).all()
        for got in grad(s, t, temperature, WHERE):
            assert np.isfinite(got).all() and not np.any(got[1]) and np.any(got)


def test_a_token_of_weight_0_may_have_any_temperature(rng):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    weights = jnp.array([2.0, 0.0, 1.0])

    @jax.jit
    def value_and_grad(s, temperature):
        f = lambda s, T: jaxkl.distillation_loss(s, t, temperature=T, weights=weights)
        return jax.value_and_grad(f, (0, 1))(s, temperature)

    at = lambda T: value_and_grad(s, jnp.array([1.0, T, 2.0]))
    for bad in BAD:
        jax.tree.map(np.testing.assert_array_equal, at(bad), at(1.0))


@over("user", slow=[x for x in ALL if x != "user"])
def test_every_divergence_is_nan_at_a_bad_temperature(rng, divergence, reference):
    s, t = rounded(rng, (2, 5)), rounded(rng, (2, 5))
    loss = jaxkl.losses.softmax_divergence
    f = jax.jit(lambda s, t, T: loss(s, t, divergence, temperature=T))
    for bad in BAD:
        assert np.isnan(f(s, t, jnp.float32(bad))).all()
    assert np.isfinite(f(s, t, jnp.float32(2))).all()


@pytest.mark.parametrize("tail", ["bucket", *rarely("renormalize", "drop", "uniform")])
def test_lists_at_a_bad_temperature(rng, tail):
    s, t = rounded(rng, (2, 5)), rounded(rng, (2, 5))

    @jax.jit
    def f(s, t, temperature, teacher_temperature):
        teacher = jaxkl.top_k_teacher(t, 2, temperature=teacher_temperature, tail=tail)
        options = dict(temperature=temperature, t_squared=False, reduction="none")
        return jaxkl.distillation_loss(s, teacher, **options)

    good = jnp.full(2, 2.0)
    assert np.isfinite(f(s, t, good, good)).all()
    for bad in BAD:
        one = good.at[0].set(bad)
        for got in f(s, t, one, good), f(s, t, good, one):
            np.testing.assert_array_equal(np.isnan(got), [True, False])


def test_samples_at_a_bad_temperature(rng):
    s, t, key = rounded(rng, (2, 5)), rounded(rng, (2, 5)), jax.random.key(0)

    @jax.jit
    def f(s, t, temperature):
        teacher = jaxkl.sampled_teacher(key, t, 4, temperature=temperature)
        own = dict(teacher_temperature=temperature, reduction="none")
        return jaxkl.distillation_loss(s, teacher, **own)

    for bad in BAD:
        got = f(s, t, jnp.array([bad, 2.0]))
        np.testing.assert_array_equal(np.isnan(got), [True, False])


@pytest.mark.parametrize(
    "dtype, value",
    [
        ("uint32", 2**32 - 1),
        *rarely(("int32", 5), ("int64", 2**32 + 1), ("uint32", 2**32 - 100)),
        *rarely(("uint64", 2**32 + 1), ("int64", -(2**32) - 100)),
    ],
)
def test_integers_out_of_range(rng, dtype, value):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    options = dict(reduction="none")

    def of_labels(s, t, labels):
        alpha = jnp.float32(0.5)
        return jaxkl.distillation_loss(s, t, labels=labels, alpha=alpha, **options)

    def of_a_list(s, indices, where=None):
        teacher = jaxkl.SparseTeacher(indices, s[:, :2] - 4, tail="bucket")
        return jaxkl.distillation_loss(s, teacher, where=where, **options)

    with jax.enable_x64(dtype.endswith("64")):
        labels = jnp.array([0, value, 4], dtype)
        got = jax.jit(of_labels)(s, t, labels)
        np.testing.assert_array_equal(np.isnan(got), ~WHERE)
        indices = jnp.stack([labels, labels + 1 - labels], -1)
        got = jax.jit(of_a_list)(s, indices)
        np.testing.assert_array_equal(np.isnan(got), ~WHERE)
        with pytest.raises(ValueError, match=r"`teacher\.indices` must be in \[0, 5\)"):
            of_a_list(s, indices)
        assert np.isfinite(of_a_list(s, indices, WHERE)).all()


@pytest.mark.parametrize(
    "dtype", ["uint8", *rarely("int8", "int16", "uint32", "int64")]
)
def test_labels_of_any_integer_dtype(rng, dtype):
    s, t = rounded(rng, (3, 300)), rounded(rng, (3, 300))
    labels = np.array([0, 99, 100])
    f = lambda x: jaxkl.distillation_loss(s, t, labels=x, alpha=0.5)
    expected = oracle.distillation_loss(s, t, labels=labels, alpha=0.5).loss
    expected = float(expected)
    np.testing.assert_allclose(f(labels.astype(dtype)), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(f)(labels.astype(dtype)), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1.7, *rarely(3)])
def test_a_number_has_the_digits_of_the_loss(rng, number):
    with jax.enable_x64(True):
        s, t = rounded(rng, (3, 5), "float64"), rounded(rng, (3, 5), "float64")
        array = jnp.float64(number)
        same = lambda f: np.testing.assert_allclose(f(number), f(array), rtol=1e-14)
        for loss in FUNCTIONS.values():
            same(lambda T, loss=loss: loss(s, t, temperature=T))
            same(lambda T, loss=loss: loss(s, t, teacher_temperature=T))
        same(lambda T: jaxkl.losses.softmax_kl_divergence(s, t, temperature=T))
        same(lambda T: jaxkl.top_k_teacher(t, 3, temperature=T).log_probs)
        # A Python number does not widen the loss.
        s, t = s.astype(jnp.float32), t.astype(jnp.float32)
        assert jaxkl.distillation_loss(s, t, temperature=number).dtype == jnp.float32
        teacher = jaxkl.top_k_teacher(t, 3, temperature=number)
        assert teacher.log_probs.dtype == jnp.float32
