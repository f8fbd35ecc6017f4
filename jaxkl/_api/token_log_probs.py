"""Log-probabilities of chosen tokens, of logits that need not be in memory."""

import functools as ft
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from .._engine.operands import Operands, Spec
from .._engine.sharding import outputs_of, Prepared
from .._engine.student_terms import Entropy, Label, Labels
from .._math.numerics import loss_dtype, zero_unless
from .._source.function_head import FunctionHead
from .._source.linear_head import LinearHead
from .._util import checks as check
from .arguments import as_tokens, check_slices, checked_models, per_token
from .options import PlanName, suggest_keywords, TokenOptions


LogProbs = jax.Array | tuple[jax.Array, jax.Array]


@overload
def token_log_probs(
    student: ArrayLike | LinearHead | FunctionHead,
    tokens: ArrayLike,
    *,
    temperature: ArrayLike = ...,
    with_entropy: Literal[False] = ...,
    where: ArrayLike | None = ...,
    vocab_size: int | None = ...,
    axis_name: str | None = ...,
    mesh: Mesh | AbstractMesh | None = ...,
    token_axes: str | Sequence[str] | None = ...,
    vocab_axis: str | None = ...,
    tile: int | None = ...,
    plan: PlanName | None = ...,
) -> jax.Array: ...
@overload
def token_log_probs(
    student: ArrayLike | LinearHead | FunctionHead,
    tokens: ArrayLike,
    *,
    temperature: ArrayLike = ...,
    with_entropy: Literal[True],
    where: ArrayLike | None = ...,
    vocab_size: int | None = ...,
    axis_name: str | None = ...,
    mesh: Mesh | AbstractMesh | None = ...,
    token_axes: str | Sequence[str] | None = ...,
    vocab_axis: str | None = ...,
    tile: int | None = ...,
    plan: PlanName | None = ...,
) -> tuple[jax.Array, jax.Array]: ...
@suggest_keywords
def token_log_probs(
    student: ArrayLike | LinearHead | FunctionHead,
    tokens: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    with_entropy: bool = False,
    where: ArrayLike | None = None,
    vocab_size: int | None = None,
    axis_name: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    token_axes: str | Sequence[str] | None = None,
    vocab_axis: str | None = None,
    tile: int | None = None,
    plan: PlanName | None = None,
) -> LogProbs:
    r"""Log-probabilities of a student at the given tokens, and its entropy.

    With $q = \mathrm{softmax}(s / T)$, token $y$ has $\log q_y$, and the entropy is
    $H = -\sum_v q_v \log q_v$. Their gradients by the logits are

    $$ \frac{\mathrm{onehot}(y) - q}{T}, \qquad
       -\frac{q\,(\log q + H)}{T}. $$

    Both are in nats, and keep their digits where one column is nearly certain. They
    take any cotangents: an importance ratio, an estimate of a KL or a policy gradient
    is a line of JAX around them.

    No `[tokens, vocab]` array is held, in either pass, beside the arguments and their
    gradients. The backward pass makes the logits of a head again. Second order
    (`jax.hessian`, reverse over reverse) works. For forward mode there is
    `jaxkl.reference.token_log_probs`.

    Args:
      student: Logits $s$, `[..., vocab]`, or the head that makes them: a `LinearHead`
        or `FunctionHead`.
      tokens: Columns, integers `[...]`, or several in each place, `[..., k]`, which may
        repeat. -1 is an empty slot: its log-probability is 0.
      temperature: $T$ in $[2^{-20}, 2^{20}]$, a scalar or `[...]`. Differentiable.
      with_entropy: Whether to return the entropy too.
      where: Places that count, bool `[...]`. The others are 0, and have no influence
        even if their logits are NaN.
      vocab_size: Number of columns that are vocabulary. The columns after them are
        padding, and their gradient is 0.
      axis_name: As in `jaxkl.distillation_loss`, like the following.
      mesh: The mesh of global arrays.
      token_axes: Mesh axis, or several, that spread the first dimension of `tokens`.
      vocab_axis: Mesh axis that spreads the vocabulary.
      tile: Number of places to take at a time.
      plan: `"fast"`, `"lean"` or None.

    Returns:
      The log-probabilities, of the shape of `tokens`; with `with_entropy` a pair of
      these and of the entropies, `[...]`. float64 if an argument is, else float32.

    Raises:
      TypeError: For an argument of a wrong type or dtype.
      ValueError: For shapes that do not fit, axes that are not in the mesh and, where
        they are known, values out of range. A traced token that is out of range makes
        its log-probability NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
      >>> print(jaxkl.token_log_probs(logits, jnp.array([1, -1])).round(4))
      [-0.2877  0.    ]
      >>> tokens = jnp.array([[0, 1], [1, -1]])
      >>> log_probs, entropy = jaxkl.token_log_probs(logits, tokens, with_entropy=True)
      >>> print(log_probs.round(4))
      [[-1.3863 -0.2877]
       [-0.6931  0.    ]]
      >>> print(f"{entropy[1]:.4f}")
      0.6931
    """
    prepared, shape = prepare_tokens(TokenOptions(**locals()))  # see `options`
    weighted, _, _ = outputs_of(prepared)
    return log_probs_of(prepared, shape, weighted)


def prepare_tokens(options: TokenOptions) -> tuple[Prepared, tuple[int, ...]]:
    """A loss whose terms are `token_log_probs`, but for the sign; the tokens' shape."""
    with_entropy = check.boolean("with_entropy", options.with_entropy)
    (source,), vocab, mask, layout, shape = checked_models(options)
    checked = check.temperature("temperature", options.temperature, shape)
    arrays = [*jax.tree.leaves((checked, source)), source.vocab_array]
    dtype = loss_dtype(*(x for x in arrays if not check.is_number(x)))
    columns, tokens_shape = as_tokens(options.tokens, mask, shape, vocab.size)
    T, weight, counted = _fold(shape, dtype, vocab.size, checked, columns, mask)
    of_tokens = (Label if columns.ndim == 1 else Labels)(weight, columns, at_1=False)
    terms = (of_tokens, Entropy(counted, at_1=False))[: 1 + with_entropy]
    operands = Operands(source, terms, T, mask)
    is_dropped = ~operands.is_weighted
    source = source.with_weightless(is_dropped, is_dropped)
    operands = operands._replace(student=source)
    spec = Spec(
        vocab,
        dtype,
        reduce=False,
        tile=options.tile,
        plan=options.plan,
    )
    if options.axis_name is not None:
        check_slices(options.axis_name, operands, labels="tokens")
    return Prepared(spec, operands, layout, shape), tokens_shape


@ft.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _fold(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    vocab_size: int,
    temperature: Any,
    columns: jax.Array,
    mask: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """The temperature, the weights of the tokens and those of places, `[B]`."""
    T = per_token(temperature, shape, dtype)
    # Under `jit` a token that is out of range cannot raise: it becomes NaN.
    weight = jnp.where((columns >= -1) & (columns < vocab_size), 1, jnp.nan)
    weight = zero_unless(columns != -1, weight.astype(dtype))
    entropy = jnp.ones(weight.shape[:1], dtype)
    if mask is not None:
        # The temperature of a token that does not count may be NaN.
        T = None if T is None else jnp.where(mask, T, 1)
        entropy = zero_unless(mask, entropy)
        weight = zero_unless(jnp.expand_dims(mask, range(1, weight.ndim)), weight)
    return T, weight, entropy


def log_probs_of(
    prepared: Prepared, shape: tuple[int, ...], weighted: tuple[jax.Array, ...]
) -> LogProbs:
    """What the user gets, of the terms `-log q` and, if asked for, the entropy."""
    of_tokens, *entropies = weighted
    log_probs = (0 - of_tokens).reshape(shape)
    for entropy in entropies:
        return log_probs, entropy.reshape(prepared.batch_shape)
    return log_probs
