"""What the battery computes, in JAX. A report quotes these functions."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

import jaxkl
import jaxkl.losses


def jax_gradients(x, t, g, **options):
    value, pull = jax.vjp(lambda x, t: jaxkl.kl_div(x, t, **options), x, t)
    g = jnp.asarray(np.resize(g, value.shape), value.dtype)
    d_input, d_target = pull(g)
    return {"value": value, "d_input": d_input, "d_target": d_target}


def jax_second_order(x, t, g, c_input, c_target, **options):
    value, _ = jax.vjp(lambda x, t: jaxkl.kl_div(x, t, **options), x, t)
    g = jnp.asarray(np.resize(g, value.shape), value.dtype)

    def gradients(x, t, g):
        return jax.vjp(lambda x, t: jaxkl.kl_div(x, t, **options), x, t)[1](g)

    _, pull = jax.vjp(gradients, x, t, g)
    c = jnp.asarray(c_input, x.dtype), jnp.asarray(c_target, t.dtype)
    d_input, d_target, d_g = pull(c)
    return {"d2_input": d_input, "d2_target": d_target, "d2_g": d_g}


def jax_call(x, t, *, module, arguments):
    built = 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            if module:
                loss = jaxkl.KLDivLoss(*arguments)
                built = len(seen)
                value = loss(x, t)
            else:
                value = jaxkl.kl_div(x, t, *arguments)
        except Exception:
            return {"outcome": "error"}
    outcome = f"warnings: {built} of the constructor, {len(seen) - built} of the call"
    return {"outcome": outcome, "value": value}


def jax_distillation(s, t, g, where=None, **options):
    def loss(s, t):
        mask = None if where is None else jnp.asarray(where, bool)
        more = dict(where=mask, differentiate_teacher=True)
        return jaxkl.distillation_loss(s, t, **more, **options)

    value, pull = jax.vjp(loss, s, t)
    d_student, d_teacher = pull(jnp.ones_like(value))
    return {"value": value, "d_input": d_student, "d_target": d_teacher}


def jax_losses(x, t, g, where=None, *, name, axis):
    f = getattr(jaxkl.losses, name)
    value, pull = jax.vjp(lambda x, t: f(x, t, axis, where), x, t)
    d_input, d_target = pull(jnp.asarray(np.resize(g, value.shape), value.dtype))
    return {"value": value, "d_input": d_input, "d_target": d_target}
