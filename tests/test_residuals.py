"""Gradients do not depend on which others were taken before.

`jax.custom_vjp` keeps one residual structure for a rule, and traces the rule again for
other differentiated arguments. A structure that differed between the two mixed up the
leaves, without an error: second derivatives by temperature came out wrong, but only in
a process that had taken these derivatives first, in this order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl


HESSIANS = {
    "forward over reverse": jax.hessian,
    "reverse over reverse": lambda f, argnums: jax.jacrev(
        jax.jacrev(f, argnums), argnums
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_order_after_other_arguments(rng, reduction):
    def total(loss, *fixed):
        options = dict(differentiate_teacher=True, reduction=reduction, t_squared=False)
        return lambda s, t, *temperature: jnp.sum(
            jnp.sin(loss(s, t, temperature=(*temperature, *fixed)[0], **options))
        )

    with jax.enable_x64(True):
        s, t = (jnp.asarray(rng.normal(size=(2, 3))) for _ in range(2))
        args = s, t, jnp.float64(2.0)
        expected = jax.hessian(
            total(jaxkl.reference.distillation_loss), argnums=(0, 1, 2)
        )(*args)
        f = jaxkl.distillation_loss
        jax.vjp(jax.jit(total(f)), *args)[1](jnp.float64(1.0))
        for hessian in HESSIANS.values():
            jax.jit(hessian(total(f, 2.0), (0, 1)))(s, t)
        for name, hessian in HESSIANS.items():
            actual = jax.jit(hessian(total(f), (0, 1, 2)))(*args)
            for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.usefixtures("all_platforms")
@pytest.mark.parametrize("plan", ["fast", "lean"])
def test_the_backward_rule_makes_no_maxima_again(rng, plan):
    hidden = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)

    def log_probs(hidden):
        head = jaxkl.LinearHead(hidden, kernel)
        return jaxkl.token_log_probs(head, jnp.arange(5), plan=plan)

    value, pull = jax.vjp(log_probs, hidden)
    backward = str(jax.make_jaxpr(pull)(value))
    assert "reduce_max" in str(jax.make_jaxpr(log_probs)(hidden))
    assert "dot_general" in backward
    assert "reduce_max" not in backward
