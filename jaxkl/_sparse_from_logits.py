"""Lists of a dense teacher's columns: the most likely, or some drawn at random."""

import functools as ft
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import _checks as check
from ._arguments import per_token
from ._numerics import loss_dtype, zero_unless
from ._softmax import SoftmaxStats
from ._sparse import SparseTeacher, Tail


def top_k_teacher(
    logits: ArrayLike, k: int, *, temperature: ArrayLike = 1.0, tail: Tail = "bucket"
) -> SparseTeacher:
    r"""The `k` most likely columns of each row, $\mathrm{softmax}(t / T)$ there.

    The probabilities are those of the whole softmax. They sum to less than 1, and
    `tail` says what becomes of the rest.

    Args:
      logits: Logits $t$, `[..., vocab]`.
      k: Columns to keep, at most `vocab`.
      temperature: $T$ in $[2^{-20}, 2^{20}]$, a scalar or `[...]`.
      tail: See `SparseTeacher`.

    Returns:
      A `SparseTeacher` of int32 `[..., k]` and float32 `[..., k]` (float64 if an
      argument is), the most likely first.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jaxkl.top_k_teacher(jnp.log(jnp.array([0.2, 0.5, 0.3])), 2)
      >>> print(teacher.indices, jnp.exp(teacher.log_probs))
      [1 2] [0.5 0.3]
    """
    t, per_row = _checked(logits, temperature)
    k = check.positive_int("k", k)
    if k > t.shape[-1]:
        raise ValueError(f"`k` must be at most vocab, {t.shape[-1]}, got {k}.")
    return SparseTeacher(*_top_k(t, per_row, k), tail=tail)


def sampled_teacher(
    key: jax.Array,
    logits: ArrayLike,
    num_samples: int,
    *,
    temperature: ArrayLike = 1.0,
) -> SparseTeacher:
    r"""Columns drawn from each row's $p = \mathrm{softmax}(t / T)$, with replacement.

    A column drawn $n$ times has $\hat p = n / \mathrm{num\_samples}$, so that
    $\mathbb{E}[\hat p] = p$: the expected gradient of a forward KL is that of the dense
    teacher, which no top-k list has. Rows are independent.

    Args:
      key: A JAX random key.
      logits: Logits $t$, `[..., vocab]`.
      num_samples: Draws for each row.
      temperature: $T$ in $[2^{-20}, 2^{20}]$, a scalar or `[...]`.

    Returns:
      A `SparseTeacher` of `[..., num_samples]`, whose tail is `"renormalize"`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([0.2, 0.8]))
      >>> teacher = jaxkl.sampled_teacher(jax.random.key(0), logits, 1000)
      >>> print(f"{(teacher.indices == 1).mean():.1f}")
      0.8

    References:
      Anshumann et al. [Sparse Logit Sampling: Accelerating Knowledge Distillation in
      LLMs](https://arxiv.org/abs/2503.16870), 2025.
    """
    num_samples = check.positive_int("num_samples", num_samples)
    t, per_row = _checked(logits, temperature)
    return SparseTeacher(*_sample(key, t, per_row, num_samples))


@ft.partial(jax.jit, static_argnums=2)
def _top_k(logits, temperature, k):
    log_probs, indices = jax.lax.top_k(_log_probs(logits, temperature), k)
    return indices, log_probs


@ft.partial(jax.jit, static_argnums=3)
def _sample(key, logits, temperature, num_samples):
    p = jnp.exp(_log_probs(logits, temperature))
    # We draw a group of columns, and then a column in it. One draw would not do: a
    # float32 uniform has 23 bits, too few for the rare columns of a large vocabulary.
    *shape, vocab = p.shape
    group = math.isqrt(vocab - 1) + 1
    p = p.reshape(-1, vocab)
    p = jnp.pad(p, ((0, 0), (0, -vocab % group))).reshape(p.shape[0], -1, group)
    outer, inner = jax.random.uniform(key, (2, p.shape[0], num_samples), p.dtype)
    mass = p.sum(axis=-1)
    groups = _draw(mass, outer)

    def within(row):
        p, at, u = row
        return _draw(p[at], u[:, None])[:, 0]

    columns = jax.lax.map(within, (p, groups, inner), batch_size=64)  # for the memory
    is_nan = jnp.isnan(mass).any(axis=-1, keepdims=True)  # no softmax to draw from
    indices = jnp.where(is_nan, 0, groups * group + columns)
    log_probs = jnp.where(is_nan, jnp.nan, -math.log(num_samples)).astype(p.dtype)
    log_probs = jnp.broadcast_to(log_probs, indices.shape)
    shape = *shape, num_samples
    return indices.reshape(shape), log_probs.reshape(shape)


def _draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Columns `[N, S]`, drawn by `weights`, `[N, V]`: their inverted distribution."""
    # A parallel sum may round neighbours differently, but a column of weight 0 must not
    # have a step of its own.
    total = zero_unless(weights > 0, jnp.cumsum(weights, axis=-1))
    total = jax.lax.cummax(total, axis=1)
    # Rounding must not reach the last step, or a column of weight 0 could be drawn.
    level = jnp.minimum(uniform * total[:, -1:], jnp.nextafter(total[:, -1:], 0))
    search = jax.vmap(lambda total, level: jnp.searchsorted(total, level, side="right"))
    return search(total, level).astype(jnp.int32)


def _checked(
    logits: ArrayLike, temperature: ArrayLike
) -> tuple[jax.Array, jax.Array | None]:
    """The logits, and the temperature of each row, `[B]`; None: 1."""
    t = check.float_array("logits", logits)
    if t.ndim == 0 or t.shape[-1] == 0:
        raise ValueError(f"`logits` must be [..., vocab], got shape {t.shape}.")
    shape = t.shape[:-1]
    T = check.temperature("temperature", temperature, shape)
    dtype = loss_dtype(t, None if check.is_number(T) else T)
    return t, per_token(T, shape, dtype)


def _log_probs(logits: jax.Array, temperature: jax.Array | None) -> jax.Array:
    """`log_softmax(logits / temperature)` in at least float32."""
    dtype = loss_dtype(logits, temperature)
    flat = logits.reshape(-1, logits.shape[-1]).astype(dtype)
    x = SoftmaxStats(jnp.max(flat, axis=-1), temperature).shifted(flat)
    # When one column has p ≈ 1, `log p = -log(1 + rest)`, and the sum `1 + rest` would
    # round to 1: log1p keeps the rest.
    at_top = jax.nn.one_hot(jnp.argmax(flat, -1), flat.shape[-1], dtype=bool)
    rest = jnp.sum(jnp.where(at_top, jnp.expm1(x), jnp.exp(x)), axis=-1, keepdims=True)
    rest = jnp.where(rest < jnp.inf, rest, jnp.nan)  # +inf has no softmax
    log_probs = jnp.where(flat == -jnp.inf, -jnp.inf, x) - jnp.log1p(rest)
    return log_probs.reshape(logits.shape)
