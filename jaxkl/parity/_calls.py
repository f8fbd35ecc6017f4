"""The calls that are compared: in JAX, with jaxkl or optax, and in PyTorch.

A call takes `input` and `target` as arrays of its framework, and the further numbers in
NumPy. It returns its quantities by name: arrays, or strings for what is no array.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkl
import jaxkl.losses

from ._errors import require_torch


FIRST: tuple[str, ...] = "value", "d_input", "d_target"
SECOND: tuple[str, ...] = "d2_input", "d2_target", "d2_g"


def call_in(library: str, kind: str, function: str) -> Callable[..., dict[str, Any]]:
    """A call of the `function` of "jaxkl", "optax" or "torch", for its `kind`.

    The kinds are "gradients", "second_order", and "outcome": an error, or warnings.
    """
    if library == "torch":
        torch = require_torch()
        functions = {
            "kl_div": torch.nn.functional.kl_div,
            "KLDivLoss": torch.nn.KLDivLoss,
            "distillation_loss": _distillation_in_torch,
        }
        calls = (_gradients_in_torch, _second_in_torch)
        f = functions[function]
    else:
        calls = (_gradients, _second_order)
        if library == "optax":
            module = importlib.import_module("optax").losses
        else:
            module = jaxkl if hasattr(jaxkl, function) else jaxkl.losses
        f = getattr(module, function)
    if kind == "outcome":
        return functools.partial(_outcome, f, function == "KLDivLoss")
    return functools.partial(calls[kind == "second_order"], f)


def _gradients(f, x, t, g, where=None, **options):
    if f is jaxkl.distillation_loss:
        options["differentiate_teacher"] = True
    if where is not None:
        options["where"] = jnp.asarray(where, bool)
    value, pull = jax.vjp(lambda x, t: f(x, t, **options), x, t)
    g = jnp.asarray(np.resize(g, value.shape), value.dtype)
    return dict(zip(FIRST, (value, *pull(g)), strict=True))


def _second_order(f, x, t, g, c_input, c_target, **options):
    def gradients(x, t, g):
        return jax.vjp(lambda x, t: f(x, t, **options), x, t)[1](g)

    value = jax.eval_shape(lambda x, t: f(x, t, **options), x, t)
    g = jnp.asarray(np.resize(g, value.shape), value.dtype)
    c = jnp.asarray(c_input, x.dtype), jnp.asarray(c_target, t.dtype)
    return dict(zip(SECOND, jax.vjp(gradients, x, t, g)[1](c), strict=True))


def _gradients_in_torch(f, x, t, g, where=None, **options):
    torch = require_torch()
    if where is not None:
        options["where"] = torch.tensor(where, dtype=torch.bool)
    value, _, gradients = _pulled_back(f, x, t, g, options)
    return dict(zip(FIRST, (value, *gradients), strict=True))


def _second_in_torch(f, x, t, g, c_input, c_target, **options):
    torch = require_torch()
    _, g, gradients = _pulled_back(f, x, t, g, options, create_graph=True)
    c = torch.tensor(c_input, dtype=x.dtype), torch.tensor(c_target, dtype=t.dtype)
    found = torch.autograd.grad(gradients, (x, t, g), c, materialize_grads=True)
    return dict(zip(SECOND, found, strict=True))


def _pulled_back(f, x, t, g, options, **more):
    torch = require_torch()
    value = f(x.requires_grad_(), t.requires_grad_(), **options)
    g = torch.tensor(np.resize(g, value.shape), dtype=value.dtype, requires_grad=True)
    return value, g, torch.autograd.grad(value, (x, t), g, **more)


def _distillation_in_torch(s, t, where=None, *, temperature, reduction):
    torch = require_torch()
    wide = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
    log_q, log_p = (torch.log_softmax(x.to(wide) / temperature, -1) for x in (s, t))
    terms = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    rows = temperature**2 * terms.sum(-1)
    rows = rows if where is None else rows[where]
    return rows.mean() if reduction == "mean" else rows.sum()


def _outcome(f, is_module, x, t, g, *, arguments):
    built = 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            if is_module:
                loss = f(*arguments)
                built = len(seen)
                value = loss(x, t)
            else:
                value = f(x, t, *arguments)
        except Exception:
            return {"outcome": "error"}
    outcome = f"warnings: {built} of the constructor, {len(seen) - built} of the call"
    return {"outcome": outcome, "value": value}
