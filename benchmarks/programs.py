"""The programs that are compiled for devices which need not exist."""

import dataclasses
import functools as ft
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import jaxkl

from . import given, labels, losses, sparse


PRODUCTS = "4 products"
PRODUCTS_OF_ONE = "3 products"  # of one head and its gradient
MAKERS = {
    "jaxkl": losses.with_jaxkl,
    "jaxkl, jit": losses.with_jaxkl,
    "plain JAX": losses.with_plain_jax,
    "optax": losses.with_optax,
    "ejkernel": losses.with_ejkernel,
}
MAKERS_OF_KL_DIV = {
    "jaxkl": given.with_jaxkl,
    "plain JAX": given.with_plain_jax,
    "optax": given.with_optax,
}
MAKERS_OF_TOP_K = {"jaxkl": sparse.with_jaxkl, "plain JAX": sparse.with_plain_jax}


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile: value and gradient by the student's arrays, T = 2.

    With `PRODUCTS` as its implementation, it is the four matrix products of two heads
    and their gradient, without a loss, or of one head that makes its logits twice.
    """

    implementation: str  # a name above; "jaxkl, jit" is partitioned by XLA
    tokens: int
    vocab: int
    hidden: int | None = None  # None: the loss takes logits
    dtype: str = "bfloat16"
    # Of `losses.DIVERGENCES` or `labels.LOSSES`, or "top-k" or "kl_div"
    loss: str = "forward-kl"
    mesh: Sequence[int] | None = None  # devices for tokens and for columns
    logits: str | None = None  # the dtype of others' logits; None: that of heads
    listed: int = 64  # columns of a teacher for "top-k"
    plan: str | None = None  # of jaxkl's heads: "fast" or "lean"


def make(job, mesh=None):
    """Returns a function, and shape, dtype and mesh axes of each of its arguments."""
    hidden = ((job.tokens, job.hidden), job.dtype, ("data",))
    kernel = ((job.hidden, job.vocab), job.dtype, (None, "model"))
    wide = ((job.tokens, job.vocab), job.dtype, ("data", "model"))
    if job.implementation == PRODUCTS:
        return products, [hidden, kernel, hidden, kernel, wide]
    if job.implementation == PRODUCTS_OF_ONE:
        return products_of_one, [hidden, kernel, wide]
    if job.loss in labels.LOSSES:
        loss = labels.MAKERS[job.implementation](job.loss)
        of_tokens = [((job.tokens,), x, ("data",)) for x in ("int32", "float32")]
        return jax.value_and_grad(loss, (0, 1)), [hidden, kernel, *of_tokens]
    if job.loss == "top-k":
        loss = MAKERS_OF_TOP_K[job.implementation]()
        listed = [
            ((job.tokens, job.listed), x, ("data",)) for x in ("int32", "float32")
        ]
        return jax.value_and_grad(loss), [wide, *listed]
    if job.loss == "kl_div":
        loss = MAKERS_OF_KL_DIV[job.implementation](job.loss)
        return jax.value_and_grad(loss), [wide, wide]
    options = {}
    if mesh is not None and job.implementation == "jaxkl":
        options = dict(mesh=mesh, token_axes="data", vocab_axis="model")
    if job.plan is not None:
        options["plan"] = job.plan
    loss = MAKERS[job.implementation](job.loss, **options)
    if job.hidden is None:
        return jax.value_and_grad(loss), [wide, wide]
    if job.implementation.startswith("jaxkl"):
        from_heads = lambda h, k, th, tk: loss(
            jaxkl.LinearHead(h, k), jaxkl.LinearHead(th, tk)
        )
    else:
        product = ft.partial(jnp.dot, preferred_element_type=job.logits)
        from_heads = lambda h, k, th, tk: loss(product(h, k), product(th, tk))
    return jax.value_and_grad(from_heads, (0, 1)), [hidden, kernel] * 2


def products(h, k, th, tk, d_logits):
    return h @ k, th @ tk, d_logits @ k.T, h.T @ d_logits


def products_of_one(h, k, d_logits):
    return h @ k, d_logits @ k.T, h.T @ d_logits
