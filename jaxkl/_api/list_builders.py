"""Lists of a dense teacher's columns: the most likely, or some drawn at random."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from .._engine.row_lists import map_rows, RowFunction, Rows, Samples, TopK
from .._engine.sharding import as_layout, Layout
from .._math.numerics import loss_dtype
from .._math.vocabulary import Vocabulary
from .._source.base import as_source, flattened, Source
from .._source.function_head import FunctionHead
from .._source.linear_head import LinearHead
from .._source.sparse_teacher import SparseTeacher, Tail
from .._util import checks as check
from .._util.compat import is_explicitly_sharded, varying_axes
from .arguments import as_vocabulary, per_token
from .options import suggest_keywords


@suggest_keywords
def top_k_teacher(
    logits_or_head: ArrayLike | LinearHead | FunctionHead,
    k: int,
    *,
    temperature: ArrayLike = 1.0,
    tail: Tail = "bucket",
    vocab_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    token_axes: str | Sequence[str] | None = None,
    vocab_axis: str | None = None,
    axis_name: str | None = None,
) -> SparseTeacher:
    r"""The `k` most likely columns of each row, $\mathrm{softmax}(t / T)$ there.

    The probabilities are those of the whole softmax. They sum to less than 1, and
    `tail` says what becomes of the rest. Its logarithm, `log_rest`, is a log-sum-exp of
    the columns that are not listed, so that it keeps its digits however small it is.

    The logits of a head are made a tile of tokens at a time: those of all tokens are
    never in memory. Devices that hold slices of the vocabulary each look for `k`
    columns, and exchange these. The list is a constant to differentiation.

    Args:
      logits_or_head: Logits $t$, `[..., vocab]`, or the head that makes them: a
        `LinearHead` or `FunctionHead`.
      k: Columns to keep, at most `vocab`.
      temperature: $T$ in $[2^{-20}, 2^{20}]$, a scalar or `[...]`.
      tail: See `SparseTeacher`.
      vocab_size: Number of columns that are vocabulary. The columns after them are
        padding, whatever they hold, and are never listed.
      mesh: The mesh of global arrays, as in `jaxkl.distillation_loss`, like the
        following.
      token_axes: Mesh axis, or several, that spread the first dimension of the tokens.
      vocab_axis: Mesh axis that spreads the vocabulary.
      axis_name: Mesh axis whose devices each hold a slice of the vocabulary, inside
        your own `jax.shard_map`.

    Returns:
      A `SparseTeacher` of int32 `[..., k]` and float32 `[..., k]` (float64 if an
      argument is), the most likely first, of equal ones the first column. It has
      `log_rest`, `[...]`, and the `temperature`. A row without a softmax, one with NaN
      or +inf or with -inf alone, has NaN.

    Raises:
      TypeError: For an argument of a wrong type or dtype.
      ValueError: For shapes that do not fit, values out of range, axes that are not in
        the mesh, and arrays on Explicit mesh axes without `mesh`.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jaxkl.top_k_teacher(jnp.log(jnp.array([0.2, 0.5, 0.3])), 2)
      >>> print(teacher.indices, jnp.exp(teacher.log_probs))
      [1 2] [0.5 0.3]
    """
    k = check.positive_int("k", k)
    prepared = _prepare(
        logits_or_head, temperature, vocab_size, mesh, token_axes, vocab_axis, axis_name
    )
    if k > prepared.vocab.size:
        raise ValueError(
            f"`k` must be at most the vocabulary, {prepared.vocab.size}, got {k}."
        )
    columns, log_probs, log_rest = prepared.map(TopK(prepared.dtype, k))
    return SparseTeacher(
        columns,
        log_probs,
        tail=tail,
        log_rest=log_rest,
        temperature=prepared.list_temperature,
    )


@suggest_keywords
def sampled_teacher(
    key: jax.Array,
    logits_or_head: ArrayLike | LinearHead | FunctionHead,
    num_samples: int,
    *,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    token_axes: str | Sequence[str] | None = None,
    vocab_axis: str | None = None,
    axis_name: str | None = None,
) -> SparseTeacher:
    r"""Columns drawn from each row's $p = \mathrm{softmax}(t / T)$, with replacement.

    A column drawn $n$ times has $\hat p = n / \mathrm{num\_samples}$, so that
    $\mathbb{E}[\hat p] = p$: the expected gradient of a forward KL is that of the dense
    teacher, which no top-k list has. Rows are independent.

    The samples of a token depend on the key, on the number of the token among all, and
    on its logits: not on a mesh, nor on how many tokens a device takes at a time. Only
    where the logits themselves round differently may a draw differ, once in some 10⁷.
    Inside your own `jax.shard_map`, tokens are taken to be spread on their first
    dimension, by the axes over which they vary, in the order of the mesh; with
    `check_vma=False` that is not known, and each device needs a key of its own.

    Args:
      key: A JAX random key, the same on all devices.
      logits_or_head: Logits $t$, `[..., vocab]`, or the head that makes them, a tile of
        tokens at a time: a `LinearHead` or `FunctionHead`.
      num_samples: Draws for each row.
      temperature: $T$ in $[2^{-20}, 2^{20}]$, a scalar or `[...]`.
      vocab_size: As in `top_k_teacher`, like the following.
      mesh: The mesh of global arrays.
      token_axes: Mesh axis, or several, that spread the first dimension of the tokens.
      vocab_axis: Mesh axis that spreads the vocabulary.
      axis_name: Mesh axis whose devices each hold a slice of the vocabulary.

    Returns:
      A `SparseTeacher` of `[..., num_samples]`, whose tail is `"renormalize"`, with the
      `temperature`.

    Raises:
      TypeError: For an argument of a wrong type or dtype.
      ValueError: As `top_k_teacher`.

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
    if not hasattr(key, "dtype"):
        raise TypeError(f"`key` must be a JAX random key, got {key!r}.")
    prepared = _prepare(
        logits_or_head, temperature, vocab_size, mesh, token_axes, vocab_axis, axis_name
    )
    _check_shared(axis_name, "key", key)
    prepared = prepared._replace(rows=prepared.rows.with_key(key, axis_name))
    columns, is_bad = prepared.map(Samples(prepared.dtype, num_samples))
    log_probs = jnp.where(is_bad, jnp.nan, -math.log(num_samples))[..., None]
    log_probs = jnp.broadcast_to(log_probs.astype(prepared.dtype), columns.shape)
    return SparseTeacher(
        columns,
        log_probs,
        tail="renormalize",
        temperature=prepared.list_temperature,
    )


class _Prepared(NamedTuple):
    """Arguments that are checked."""

    rows: Rows
    vocab: Vocabulary
    layout: Layout | None
    dtype: jnp.dtype
    batch_shape: tuple[int, ...]
    list_temperature: Any  # as it was given: a number, or an array

    def map(self, f: RowFunction) -> Any:
        """What `f` makes of all rows, by the batch shape."""
        tile = f.tile(self.vocab)
        outputs = map_rows(f, self.vocab, self.layout, tile, self.rows)
        unflattened = lambda x: x.reshape(self.batch_shape + x.shape[1:])
        return jax.tree.map(unflattened, outputs)


_NAME = "logits_or_head"


def _prepare(
    given: Any,
    temperature: ArrayLike,
    vocab_size: int | None,
    mesh: Mesh | AbstractMesh | None,
    token_axes: str | Sequence[str] | None,
    vocab_axis: str | None,
    axis_name: str | None,
) -> _Prepared:
    layout = as_layout(mesh, token_axes, vocab_axis, axis_name)
    source = _as_source(given)
    shape = source.batch_shape
    source = flattened(jax.lax.stop_gradient(source))
    if layout is None and any(map(is_explicitly_sharded, jax.tree.leaves(source))):
        raise ValueError(
            f"`mesh` must be given if `{_NAME}` is on Explicit mesh axes, with "
            "`token_axes`, `vocab_axis` or both."
        )
    if layout is not None and not source.splits_columns:
        layout = layout.without_vocab_axis()
    vocab = as_vocabulary(vocab_size, {_NAME: source}, axis_name)
    T = jax.lax.stop_gradient(check.temperature("temperature", temperature, shape))
    arrays = [*jax.tree.leaves((T, source)), source.vocab_array]
    dtype = loss_dtype(*(x for x in arrays if not check.is_number(x)))
    if axis_name is not None:
        if axis_name not in varying_axes(source.vocab_array):
            raise ValueError(
                f"`{_NAME}` must hold a slice of the vocabulary on each device of axis "
                f"{axis_name!r}, got the same columns on all of them."
            )
        _check_shared(axis_name, "temperature", T)
    rows = Rows(source, per_token(T, shape, dtype))
    own = temperature if check.is_number(temperature) else T
    return _Prepared(rows, vocab, layout, dtype, shape, own)


def _as_source(given: Any) -> Source:
    if isinstance(given, SparseTeacher):
        raise TypeError(
            f"`{_NAME}` must be logits [..., vocab] or the head that makes them, got "
            "SparseTeacher, which is a list already."
        )
    return as_source(_NAME, given)


def _check_shared(axis_name: str | None, name: str, x: Any) -> None:
    if isinstance(x, jax.Array) and axis_name in varying_axes(x):
        raise ValueError(
            f"`{name}` must be the same on all devices of axis {axis_name!r}, over "
            "which only the vocabulary is spread; got an array that varies over it."
        )
