"""`jaxkl.reference.distillation_loss` has the same values, and forward mode."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference

from . import oracle
from .cases import (
    ALL,
    assert_matches,
    FORWARD,
    JENSEN_SHANNON,
    KINDS,
    over_kinds,
    rarely,
    rounded,
)
from .helpers import assert_close
from .sources import make_models, per_token, TAILS


reference_loss = jaxkl.reference.distillation_loss


@pytest.mark.parametrize(
    "name", ["distillation_loss", "cross_entropy", "token_log_probs"]
)
def test_same_signature(name):
    mine = inspect.signature(getattr(jaxkl, name)).parameters
    theirs = inspect.signature(getattr(jaxkl.reference, name)).parameters
    defaults = lambda parameters: {name: p.default for name, p in parameters.items()}
    assert defaults(theirs) == defaults(mine)


REDUCTIONS = ("none", "sum", "mean")


@pytest.mark.parametrize(
    "source, divergence, reduction",
    [
        *(("logits", FORWARD, x) for x in ("none", "mean")),
        ("head", JENSEN_SHANNON, "mean"),
        ("bucket", FORWARD, "mean"),
        *rarely(*(("logits", ALL[x], y) for x in KINDS for y in REDUCTIONS)),
        *rarely(("logits", FORWARD, "sum"), ("head", FORWARD, "mean")),
        *rarely(*((x, FORWARD, "mean") for x in TAILS if x != "bucket")),
    ],
)
def test_matches_the_oracle(rng, source, divergence, reduction):
    models = make_models(rng, source, (3, 5), 11, pad=(3, 1))
    arrays = per_token(rng, (3, 5), "temperature", "weights", "where", "labels")
    if source not in TAILS:
        arrays["teacher_temperature"] = jnp.float32(1.5)
    numbers = dict(alpha=0.3, label_smoothing=0.1, z_loss=1e-2, vocab_size=11)
    options = dict(loss=reference_loss, reduction=reduction)
    if source == "head":
        options |= dict(value_tol=1e-5, tol=2e-5)
    assert_matches(*models, divergence, **arrays, **numbers, **options)


@pytest.mark.parametrize("dtype", ["float64", *rarely("bfloat16", "float16")])
def test_dtypes(rng, dtype):
    with jax.enable_x64(dtype == "float64"):
        s, t = rounded(rng, (4, 7), dtype), rounded(rng, (4, 7), dtype)
        assert_matches(s, t, FORWARD, loss=reference_loss, temperature=2.0)


@pytest.mark.slow
@over_kinds
def test_agrees_with_the_custom_rule_in_float64(rng, divergence, reference):
    with jax.enable_x64(True):
        s, t = rounded(rng, (4, 7), "float64"), rounded(rng, (4, 7), "float64")
        f = lambda loss: jax.jit(
            jax.value_and_grad(
                lambda s, t: loss(
                    s,
                    t,
                    divergence=divergence,
                    temperature=2.0,
                    differentiate_teacher=True,
                ),
                argnums=(0, 1),
            )
        )(s, t)
        mine, theirs = f(jaxkl.distillation_loss), f(reference_loss)
        assert_close(mine[0], theirs[0], 1e-12)
        assert_close(mine[1][0], theirs[1][0], 1e-12)
        assert_close(mine[1][1], theirs[1][1], 1e-12)


@over_kinds
def test_forward_mode(rng, divergence, reference):
    with jax.enable_x64(True):
        s, t = rounded(rng, (2, 3, 7), "float64")
        names = ("student", "teacher", "temperature", "weights")
        primals = (s, t, jnp.asarray([1.5, 1, 2]), jnp.asarray([1.0, 0, 3]))
        tangents = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in primals)
        f = lambda s, t, temperature, weights: reference_loss(
            s,
            t,
            temperature=temperature,
            weights=weights,
            divergence=divergence,
            differentiate_teacher=True,
        )

        @jax.jit
        def both(primals, tangents):
            value, linear = jax.linearize(f, *primals)
            return jax.jvp(f, primals, tangents), (value, linear(*tangents))

        grads = oracle.distillation_loss(
            **dict(zip(names, primals, strict=True)), divergence=reference
        )
        expected = sum(
            np.sum(getattr(grads, name) * np.asarray(x))
            for name, x in zip(names, tangents, strict=True)
        )
        for value, tangent in both(primals, tangents):
            assert_close(value, grads.loss, 1e-12)
            assert_close(tangent, expected, 1e-11)


def test_a_constant_teacher_has_no_tangent(rng):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    f = lambda t: reference_loss(s, t)
    with pytest.warns(UserWarning, match="`teacher` is differentiated"):
        _, tangent = jax.jvp(f, (t,), (t,))
    assert tangent == 0


@over_kinds
def test_masks_and_dropped_rows(rng, divergence, reference):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    s, t = s.at[:, 1].set(-np.inf), t.at[:, 1].set(-np.inf)
    s, t = s.at[2].set(np.nan), t.at[0].set(np.inf)
    where = jnp.array([False, True, False, True])
    assert_matches(
        s,
        t,
        (divergence, reference),
        loss=reference_loss,
        where=where,
        temperature=jnp.float32(2),
    )


@pytest.mark.parametrize(
    "tokens, reduction",
    [
        (0, "mean"),
        (3, "none"),
        *rarely((0, "none"), (0, "sum"), (3, "mean"), (3, "sum")),
    ],
)
def test_no_token_gives_zero(rng, tokens, reduction):
    s, t = rounded(rng, (tokens, 5)), rounded(rng, (tokens, 5))
    f = lambda s: reference_loss(
        s, t, where=jnp.zeros(tokens, bool), reduction=reduction
    )
    value, vjp = jax.vjp(jax.jit(f), s)
    assert not value.any() and not vjp(jnp.ones_like(value))[0].any()
