"""Parameters of divergences that are arrays: traced scalars, or one for each token.

The losses named "moving" in registry.py have one for each token in tests of properties.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxkl
import jaxkl.reference
from jaxkl import (
    distillation_loss,
    ForwardKL,
    JensenShannon,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)
from jaxkl._engine import rule

from . import oracle
from .cases import assert_matches, evaluate, rarely, squared_error
from .helpers import assert_close
from .moving import MOVING
from .sources import expected_of, make_models, rounded
from .test_meshes import axes_of


def over_moving(*quick, without=()):
    """Parametrises a test over names; those that are not `quick` are slow."""
    others = [name for name in MOVING if name not in (*quick, *without)]
    return pytest.mark.parametrize("name", [*quick, *rarely(*others)])


@over_moving("kls", "alpha")
def test_a_schedule_compiles_once(rng, name):
    """And a scalar is the same for all tokens."""
    moving = MOVING[name]
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    loss = ft.partial(distillation_loss, differentiate_teacher=True)
    traces = []

    @jax.jit
    def step(s, t, x):
        traces.append(x)
        f = ft.partial(loss, divergence=moving.make(x))
        return jax.value_and_grad(f, (0, 1))(s, t)

    @jax.jit
    def of_divergence(s, t, divergence):
        traces.append(divergence)
        return jax.value_and_grad(ft.partial(loss, divergence=divergence), (0, 1))(s, t)

    for x in map(jnp.float32, moving.values):
        found = step(s, t, x)
        other = of_divergence(s, t, moving.make(x))
        jax.tree.map(np.testing.assert_array_equal, found, other)
        value, (d_s, d_t) = found
        want = expected_of(s, t, divergence=moving.oracle(float(x)))
        assert_close(value, want.loss, 2e-6)
        assert_close(d_s, want.student, 1e-5)
        assert_close(d_t, want.teacher, 1e-5, floor=1e-9)
    assert len(traces) == 2


def test_the_engine_compiles_once_without_jit(rng):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    f = lambda x: distillation_loss(s, t, divergence=SymmetricKL(jnp.float32(x)))
    f(0.1)
    before = rule._value._cache_size()
    assert f(0.2) != f(0.7)
    assert rule._value._cache_size() == before


@pytest.mark.parametrize("wrap", [jax.checkpoint, *rarely(lambda f: f)])
def test_scan_over_a_schedule(rng, wrap):
    s, t, betas = rounded(rng, (3, 7)), rounded(rng, (3, 7)), np.linspace(0, 1, 5)

    @jax.jit
    @jax.grad
    def grad(s):
        def step(total, beta):
            divergence = JensenShannon(beta, normalized=True)
            f = wrap(ft.partial(distillation_loss, divergence=divergence))
            return total + f(s, t), None

        return jax.lax.scan(step, jnp.float32(0), jnp.float32(betas))[0]

    of = lambda beta: oracle.jensen_shannon(float(beta), normalized=True)
    wants = [expected_of(s, t, divergence=of(beta)).student for beta in betas]
    assert_close(grad(s), sum(wants), 1e-5)


@pytest.mark.slow
def test_a_float64_parameter_makes_a_float64_loss(rng):
    with jax.enable_x64(True):
        s, t = rounded(rng, (2, 7)), rounded(rng, (2, 7))
        f = lambda w: distillation_loss(s, t, divergence=SymmetricKL(w))
        assert f(jnp.float64(0.3)).dtype == jnp.float64
        assert f(jnp.float32(0.3)).dtype == f(0.3).dtype == jnp.float32


# Digits: near the teacher, in confident rows, and at infinite terms.


@pytest.mark.parametrize("noise", [1e-4, *rarely(1e-2)])
@over_moving("symmetric", without=("mixture",))
def test_near_the_teacher(rng, name, noise):
    t = rounded(rng, (9, 500))
    s = t + rounded(rng, t.shape, scale=noise)
    divergence, reference = MOVING[name].over(9)
    arguments = dict(reduction="none", temperature=2.0)
    value, grads = evaluate(s, t, divergence=divergence, **arguments)
    want = expected_of(s, t, divergence=reference, **arguments)
    # The rounding of logits less their maximum, about 1e-7, relative to the noise.
    tol = 2e-7 / noise
    np.testing.assert_allclose(value, np.float64(want.loss), rtol=tol, atol=1e-30)
    for i in range(9):
        assert_close(grads["student"][i], want.student[i], tol)
    same, grads = evaluate(t, t, divergence=divergence, **arguments)
    assert not same.any() and not grads["student"].any() and not grads["teacher"].any()


CONFIDENT = {
    "confident": ([20, 1, 0], [20, 0, 0.5]),
    "confident student": ([14, 0, 0.3], [-60, 0, 0.1]),
    "apart": ([0, -60, 3], [0, 2, 1]),
    "far apart": ([0, -300, 3], [-300, 0, 1]),
}


@over_moving("js_normalized", without=("mixture",))
def test_digits_of_confident_rows(name):
    """Each row with each value of the parameter."""
    moving = MOVING[name]
    divergence, reference = moving.over((4, 9))
    rows = np.float32(list(CONFIDENT.values()))
    s, t = np.tile(rows[:, None], (1, 9, 1, 1)).transpose(2, 0, 1, 3)
    s, t = jnp.asarray(s), jnp.asarray(t)
    value, grads = evaluate(s, t, divergence=divergence, reduction="none")
    want = expected_of(s, t, divergence=reference, reduction="none")
    for i in np.ndindex(4, 9):
        if not np.abs(np.float64(want.loss[i])) < 3e38:
            continue  # α = 2 overflows
        at = f"{list(CONFIDENT)[i[0]]} at {moving.array((4, 9))[i]}"
        assert_close(value[i], want.loss[i], 5e-6, at)
        assert_close(grads["student"][i], want.student[i], 5e-6, at)


@pytest.mark.parametrize("make", [SkewForwardKL, *rarely(SkewReverseKL)])
def test_a_mixture_of_the_student_alone_where_it_has_nothing(make):
    """At α = 0, where the student has no probability either."""
    log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, -jnp.inf])
    at = 1 if make is SkewForwardKL else 0
    models = (log_p, log_q) if at else (log_q, log_p)
    slope = lambda alpha: jax.grad(lambda *x: make(alpha)(*x).sum(), at)(*models)
    assert_close(jax.jit(slope)(jnp.float32(0)), slope(0), 1e-6)


@pytest.mark.slow
@over_moving("symmetric")
def test_infinite_terms_are_those_of_numbers(rng, name):
    make = MOVING[name].make
    s, t = rounded(rng, (2, 7)), rounded(rng, (2, 7))
    s, t = s.at[:, 3].set(-jnp.inf), t.at[:, 3].set(-jnp.inf)
    s, t = s.at[0, 1].set(-jnp.inf), t.at[1, 1].set(-jnp.inf)
    leaves = lambda x: jax.tree.leaves(
        evaluate(s, t, divergence=make(x), reduction="none")
    )
    for x in MOVING[name].values:
        if name in ("js", "mixture") and x in (0, 1):
            continue  # There is no such number.
        numbers = leaves(float(np.float32(x)))
        for got, want in zip(leaves(jnp.float32(x)), numbers, strict=True):
            np.testing.assert_array_equal(np.isinf(got), np.isinf(want), str(x))
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want), str(x))
            if name.startswith("skew") and 0.99 < x < 1:
                continue  # There the formula of a number has lost digits.
            finite = lambda y: np.where(np.isfinite(y), y, 0)
            assert_close(finite(got), finite(want), 5e-6, str(x))


def own_reverse_kl(log_p, log_q):
    return jnp.exp(log_q) * (log_q - log_p)


@pytest.mark.parametrize(
    "last, kind",
    [
        (own_reverse_kl, jnp.float32),
        *rarely((own_reverse_kl, int), (ReverseKL(), jnp.float32), (ReverseKL(), int)),
    ],
)
def test_a_weight_of_zero_leaves_out_what_is_infinite(rng, last, kind):
    s, t = rounded(rng, (2, 7)), rounded(rng, (2, 7)).at[:, 1].set(-jnp.inf)
    mixture = lambda w: Mixture(((1.0, JensenShannon()), (w, last)))
    assert_matches(s, t, (mixture(kind(0)), oracle.jensen_shannon()), value_tol=2e-6)
    assert not np.isfinite(evaluate(s, t, divergence=mixture(kind(1)))[0])


@pytest.mark.slow
@over_moving("js_normalized")
@pytest.mark.parametrize("reduction", ["mean", *rarely("none")])
def test_second_order(rng, name, reduction):
    """Three values with a limit, in float64."""
    moving = MOVING[name]
    s, t = (rng.normal(size=(3, 4)) for _ in range(2))
    g = rng.normal(size=3) if reduction == "none" else 1.0
    with jax.enable_x64(True):
        divergence, reference = moving.over(3, dtype="float64")

    def theirs(s):
        return oracle.distillation_loss(
            s.reshape(3, 4), t, divergence=reference, cotangent=g, reduction=reduction
        ).student.ravel()

    def mine(s):
        more = dict(divergence=divergence, reduction=reduction)
        return jnp.sum(g * distillation_loss(s.reshape(3, 4), t, **more))

    with jax.enable_x64(True):
        for jacobian in jax.jacfwd, jax.jacrev:
            hessian = jax.jit(jacobian(jax.grad(mine)))
            for point in s.ravel(), t.ravel():
                want = oracle.jacobian(theirs, point)
                assert_close(hessian(jnp.asarray(point)), want, 1e-8)


# Programs.


@pytest.mark.slow
def test_a_mixture_is_one_pass(rng):
    """As many products, and as many exponentials of logits, as a `SymmetricKL`."""
    student, teacher = make_models(rng, "head", (8,), 300)

    def operations(divergence, *names):
        f = jax.grad(ft.partial(distillation_loss, divergence=divergence, tile=4))
        text = jax.jit(f).lower(student, teacher).as_text()
        return [text.count(f"stablehlo.{name} ") for name in names]

    kinds = "dot_general", "exponential"
    x = jnp.float32(0.3)
    want = operations(SymmetricKL(0.3), *kinds)
    for divergence in (
        SymmetricKL(x),
        Mixture(((0.3, ForwardKL()), (0.7, ReverseKL()))),
        Mixture(((x, ForwardKL()), (1 - x, SymmetricKL(x)))),
    ):
        assert operations(divergence, *kinds) == want
    dots = lambda divergence: operations(divergence, "dot_general")
    assert dots(MOVING["mixture"].make(x)) == dots(JensenShannon())


@pytest.mark.slow
def test_a_mixture_of_numbers_is_the_program_of_a_symmetric_kl(rng):
    s, t = rounded(rng, (4, 7)), rounded(rng, (4, 7))
    f = lambda d: jax.jit(jax.grad(ft.partial(distillation_loss, divergence=d)))
    text = lambda d: f(d).lower(s, t).as_text()
    mixture = Mixture(((0.25, ForwardKL()), (0.75, ReverseKL())))
    assert text(mixture) == text(SymmetricKL(0.25))


def direct(s, t, *, divergence, reduction):
    del reduction
    return divergence(jax.nn.log_softmax(t), jax.nn.log_softmax(s))


@pytest.mark.parametrize(
    "loss", [distillation_loss, direct, *rarely(jaxkl.reference.distillation_loss)]
)
@over_moving("symmetric")
def test_arrays_are_constants(rng, name, loss):
    moving = MOVING[name]
    s, t = rounded(rng, (7, 5)), rounded(rng, (7, 5))
    f = lambda d: loss(s, t, divergence=d, reduction="none").sum()
    for d in jax.tree.leaves(jax.jit(jax.grad(f))(moving.make(moving.array(7)))):
        assert d.shape == (7,) and not d.any()


def test_an_array_that_differs_over_the_vocabulary_axis(rng):
    s, t = rounded(rng, (4, 8)), rounded(rng, (4, 8))
    f = lambda s, t, x: distillation_loss(
        s, t, axis_name="model", divergence=SymmetricKL(x)
    )
    specs = P(None, "model"), P(None, "model"), P("model")
    mesh = axes_of("2x4")["mesh"]
    f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P()))
    says = "`divergence` must be the same on all devices"
    with pytest.raises(ValueError, match=says):
        f(s, t, jnp.full(16, 0.5))


# Lists, metrics, and the other losses.


@pytest.mark.slow
@over_moving("js")
@pytest.mark.parametrize("tail", ["renormalize", *rarely("bucket", "uniform")])
def test_lists(rng, name, tail):
    """Each token has its digits, and what is infinite without mass is refused."""
    student, teacher = make_models(rng, tail, (9,), 11)
    moving = MOVING[name]
    if tail == "renormalize" and name in ("symmetric", "kls", "mixture"):
        with pytest.raises(ValueError, match="`divergence`"):
            distillation_loss(student, teacher, divergence=moving.over(9)[0])
        return
    if tail == "renormalize":  # p = 0 outside the list, where a limit may be infinite
        finite = [x for x in moving.values if 0 < x < 1 or name == "alpha" and x > 0]
        moving = moving._replace(values=finite)
    divergence, reference = moving.over(9)
    more = dict(divergence=divergence, reduction="none", tile=4)
    value, grads = evaluate(student, teacher, **more)
    want = expected_of(student, teacher, divergence=reference, reduction="none")
    for i, x in enumerate(moving.array(9)):
        assert_close(value[i], want.loss[i], 5e-6, f"value at {x}", 1e-12)
        got = grads["student"][i]
        assert_close(got, want.student[i], 2e-5, f"gradient at {x}", 1e-12)


@pytest.mark.parametrize("tail", ["renormalize", "drop"])
def test_tails_that_refuse_an_array(rng, tail):
    student, teacher = make_models(rng, tail, (3,), 11)
    for make in (SymmetricKL, lambda x: Mixture(((x, ReverseKL()),))):
        f = lambda x, make=make: distillation_loss(student, teacher, divergence=make(x))
        with pytest.raises(ValueError, match="`divergence`.*array"):
            jax.jit(f)(jnp.float32(0.5))


@pytest.mark.slow
@over_moving("symmetric")
def test_metrics(rng, name):
    s, t = rounded(rng, (9, 7)), rounded(rng, (9, 7))
    arguments = dict(weights=np.float32(rng.uniform(0.5, 2, 9)), temperature=2.0)
    divergence, reference = MOVING[name].over(9)
    f = ft.partial(jaxkl.distillation_loss_with_metrics, divergence=divergence)
    _, got = f(s, t, **arguments)
    want = oracle.metrics(s, t, divergence=reference, **arguments)
    assert_close(got.divergence, want.divergence, 2e-6)
    assert_close(got.kl, want.kl, 2e-6)


@over_moving("symmetric")
def test_softmax_divergence(rng, name):
    s, t = rounded(rng, (7, 9)), rounded(rng, (7, 9))
    divergence, reference = MOVING[name].over(9)
    where = np.arange(7) != 2
    f = ft.partial(jaxkl.losses.softmax_divergence, axis=0, where=where[:, None])

    @jax.jit
    def run(s):
        got, vjp = jax.vjp(lambda s: f(s, t, divergence), s)
        return got, *vjp(jnp.ones_like(got))

    got, d_s = run(s)
    kept = lambda x: np.asarray(x)[where].T
    want = expected_of(kept(s), kept(t), divergence=reference, reduction="none")
    assert_close(got, want.loss, 2e-6)
    assert_close(kept(d_s), want.student, 1e-5)
    assert not d_s[2].any()


# A divergence as a value.


def test_a_divergence_is_a_pytree_of_its_arrays():
    x, w = jnp.array([0, 0.5, 1]), jnp.ones(3)
    terms = (w, JensenShannon(x)), (0.5, ForwardKL()), (2, squared_error)
    divergence = Mixture(terms)
    leaves, structure = jax.tree.flatten(divergence)
    assert len(leaves) == 2 and leaves[0] is w and leaves[1] is x
    again = jax.tree.unflatten(structure, leaves)
    assert again.terms[0][1].beta is x and again.terms[2] == (2, squared_error)
    assert jax.tree.structure(jax.tree.map(lambda _: None, divergence)) is not None
    assert jax.tree.map(lambda _: object(), divergence) is not None
    assert hash(structure) == hash(jax.tree.structure(again))
    for number in (0.5, 1, np.float64(0.5)):
        assert not jax.tree.leaves(SymmetricKL(number))
    assert jax.tree.structure(SymmetricKL(0.5)) != jax.tree.structure(SymmetricKL(0.4))
    assert jax.tree.leaves(ForwardKL()) == []


@pytest.mark.parametrize(
    "divergence",
    [Mixture(((2, TotalVariation()),)), *rarely(ForwardKL(), SymmetricKL(0.2))],
)
def test_a_divergence_with_numbers_is_a_constant_of_jit(rng, divergence):
    s, t = rounded(rng, (3, 7)), rounded(rng, (3, 7))
    f = jax.jit(lambda s, t, d: distillation_loss(s, t, divergence=d))
    assert f(s, t, divergence) == distillation_loss(s, t, divergence=divergence)


def test_mixtures_are_hashable_and_equal_by_value():
    make = lambda w: Mixture([[w, ForwardKL()], (1, SymmetricKL(0.2))])
    assert make(0.5) == make(0.5) and hash(make(0.5)) == hash(make(0.5))
    assert make(0.5) != make(0.4)
    with pytest.raises(TypeError, match="hash"):
        hash(make(jnp.float32(0.5)))
    assert "0.5" in repr(make(0.5)) and "ForwardKL()" in repr(make(0.5))


@pytest.mark.slow
def test_a_direct_call_takes_parameters_of_leading_axes(rng):
    log_p, log_q = (jax.nn.log_softmax(rounded(rng, (2, 3, 5))) for _ in range(2))
    x = jnp.asarray(rng.uniform(size=(2, 3)), jnp.float32)
    got = SkewForwardKL(x)(log_p, log_q).sum(-1)
    for i in np.ndindex(2, 3):
        want = SkewForwardKL(float(x[i]))(log_p[i], log_q[i]).sum()
        np.testing.assert_allclose(got[i], want, rtol=2e-6)


def test_mixtures_of_mixtures_and_of_nothing(rng):
    s, t = rounded(rng, (3, 7)), rounded(rng, (3, 7))
    inner = lambda w: Mixture(((w, ReverseKL()),))
    nested = lambda w: Mixture(((2.0, inner(w)), (0, squared_error)))
    pair = nested(jnp.float32(0.3)), oracle.mixture((0.6, oracle.reverse_kl))
    assert_matches(s, t, pair, value_tol=2e-6)
    for nothing in (nested(jnp.float32(0)), nested(0)):
        value, grads = evaluate(s, t, divergence=nothing)
        assert value == 0 and not any(x.any() for x in grads.values())


# Bad values. test_divergences.py has numbers out of range.


@over_moving("symmetric", without=("mixture", "kls"))
def test_values_out_of_range(rng, name):
    make = MOVING[name].make
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    word = dict(symmetric="weight", js="beta", js_normalized="beta").get(name, "alpha")
    where = jnp.array([True, False, True])

    @jax.jit
    def f(x):
        more = dict(divergence=make(x), reduction="none")
        loss = ft.partial(distillation_loss, s, t, **more)
        plain = ft.partial(jaxkl.reference.distillation_loss, s, t, **more)
        return loss(), loss(where=where), plain(where=where)

    for value in [np.nan, np.inf] + ([] if name == "alpha" else [-0.1, 1.1]):
        x = jnp.array([0.5, value, 0.5], jnp.float32)
        with pytest.raises(ValueError, match=f"`{word}` must be .* got {value}"):
            make(x)
        every, kept, plain = f(x)
        np.testing.assert_array_equal(np.isnan(every), [False, True, False])
        assert np.isfinite(kept).all() and np.isfinite(plain).all()


def test_weights_of_mixtures_are_finite():
    for bad in np.nan, np.inf, jnp.float32(jnp.nan):
        with pytest.raises(ValueError, match="`weight`"):
            Mixture(((bad, ForwardKL()),))
    Mixture(((-1, ForwardKL()), (jnp.float32(-1), ReverseKL())))


@pytest.mark.parametrize("name", MOVING)
def test_parameters_are_numbers_or_arrays_of_floats(name):
    make = MOVING[name].make
    if name == "kls":
        make = lambda value: Mixture(((value, ForwardKL()),))
    for value in (True, "0.5", None, [0.5], jnp.int32(1), 1j):
        with pytest.raises(TypeError, match="`(beta|alpha|weight)` must be"):
            make(value)


def test_shapes_that_do_not_fit(rng):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    for make in (SymmetricKL, lambda x: Mixture(((x, ForwardKL()),))):
        for shape in (2,), (3, 1), (1, 3), (5,):
            with pytest.raises(ValueError, match=r"`weight` must have .* \(3,\), got"):
                distillation_loss(s, t, divergence=make(jnp.full(shape, 0.5)))


@pytest.mark.parametrize(
    "terms, error, message",
    [
        ((), ValueError, "`terms` must be pairs"),
        (ForwardKL(), ValueError, "`terms` must be pairs"),
        ((0.5, ForwardKL()), ValueError, "`terms` must be pairs"),
        (((0.5, ForwardKL),), TypeError, r"`divergence` .* such as ForwardKL\(\)"),
        (((0.5, 0.5),), TypeError, "`divergence` must be callable"),
        (((0.5, ForwardKL(), 1),), ValueError, "`terms` must be pairs"),
    ],
)
def test_terms_of_mixtures(terms, error, message):
    with pytest.raises(error, match=message):
        Mixture(terms)


def test_a_mixture_of_a_function_that_is_not_elementwise(rng):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    mixture = Mixture(((1, ForwardKL()), (1, lambda log_p, log_q: log_p.sum(-1))))
    with pytest.raises(ValueError, match="`divergence` must be elementwise"):
        distillation_loss(s, t, divergence=mixture)
