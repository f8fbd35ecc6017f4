"""Teachers given by a few columns of each row."""

import dataclasses
import functools as ft
from typing import Any, ClassVar, get_args, Literal, NamedTuple, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from .._math.numerics import loss_dtype, safe_log, zero_unless
from .._util import checks as check
from .base import Given, Kind, Source
from .lists import merge_repeated, positions, unlisted_mass


Tail = Literal["renormalize", "drop", "bucket", "uniform", "conditional"]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class SparseTeacher(Given):
    r"""A teacher known by the log-probabilities of `k` columns in each row.

    Let $L$ be the listed columns, $p$ their probabilities and $\rho$ the rest of the
    mass. The tail says what becomes of it:

    - `"bucket"`: the rest is one more outcome, of probability $\rho$ in the teacher and
      $1 - \sum_L q$ in the student: two rows of $k + 1$ outcomes. It is a lower bound
      of the dense divergence.
    - `"renormalize"`: the listed mass is scaled to 1 and $p = 0$ elsewhere, so the
      values need not be normalised. It is biased. Divergences that are infinite where
      $p = 0 < q$, such as `ReverseKL`, refuse it.
    - `"drop"`: the loss is $\sum_L p \log (p / q)$, without the columns outside $L$.
      For `ForwardKL` only; the value may be negative.
    - `"uniform"`: $\rho$ is spread evenly over the columns outside $L$.
    - `"conditional"`: both models are taken given that the outcome is in $L$. The
      listed mass is scaled to 1, and the student is
      $q_v = e^{z_v} / \sum_{w \in L} e^{z_w}$, a softmax over the listed columns alone.
      The other logits have no influence, and a gradient of 0: nothing teaches the
      student to leave mass in the list. Any divergence has a meaning.

    The log-probabilities are at the teacher's temperature already: the `temperature` of
    a loss divides the student's logits only, and must be that of the list. They are
    constants to differentiation, and so are the other arrays. If all columns are
    listed, each tail gives the loss of the dense teacher.

    The rest is $e^{\mathrm{log\_rest}}$. Without it, the rest is
    $\rho = 1 - \sum_L p$, but at least what rounding may hide,
    $\tfrac\epsilon2 \sum_L p\,(1 + |\log p|)$, with the machine epsilon of the dtype in
    which `log_probs` are given: so divergences that are infinite at $p = 0$ stay
    finite. Masses $\sum_L p + \rho$ between 1 and 1.02, as rounding leaves them, are
    scaled to 1.

    Args:
      indices: Columns, integers `[..., k]`. -1 is an empty slot, and repeated columns
        add up. A token whose slots are all empty has nothing to renormalize, and
        nothing that is given: its loss is NaN.
      log_probs: The log-probabilities of these columns, `[..., k]`.
      tail: What becomes of the mass that is not listed.
      log_rest: The log of the mass outside the list, `[...]`, as `top_k_teacher` makes
        it; for the tails `"bucket"` and `"uniform"`. None: see above.
      temperature: The temperature at which the list was made, a number, or an array
        `[]` or `[...]`. The loss's `teacher_temperature`, or its `temperature` if that
        is None, must be the same, to a thousandth: if it is not, that is an error, and
        a loss of NaN where a value is traced. None: it is not known.

    Raises:
      ValueError: For an unknown tail. The loss has one for shapes that do not fit and,
        where values are known, for columns out of range and, with the tails `"bucket"`,
        `"uniform"` and `"drop"`, for a mass above 1.02, as raw logits and probabilities
        have. Where they are traced, the loss of such a token is NaN.

    References:
      Anshumann et al. [Sparse Logit Sampling: Accelerating Knowledge Distillation in
      LLMs](https://arxiv.org/abs/2503.16870), 2025.
    """

    indices: jax.Array
    log_probs: jax.Array
    tail: Tail = dataclasses.field(default="bucket", kw_only=True)
    log_rest: jax.Array | None = dataclasses.field(default=None, kw_only=True)
    temperature: ArrayLike | None = dataclasses.field(default=None, kw_only=True)

    if TYPE_CHECKING:

        def __init__(
            self,
            indices: ArrayLike,
            log_probs: ArrayLike,
            *,
            tail: Tail = "bucket",
            log_rest: ArrayLike | None = None,
            temperature: ArrayLike | None = None,
        ) -> None: ...

    def __post_init__(self):
        check.one_of("tail", self.tail, get_args(Tail))
        if check.is_number(self.temperature):
            check.temperature("temperature", self.temperature, ())

    def tree_flatten_with_keys(self):
        # A temperature that is a number is part of the program.
        static = None if _is_leaf(self.temperature) else self.temperature
        leaves = {name: getattr(self, name) for name in _LEAVES}
        if not _is_leaf(self.temperature):
            leaves["temperature"] = None
        keys = jax.tree_util.GetAttrKey
        return [(keys(name), x) for name, x in leaves.items()], (self.tail, static)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        # They may be anything that JAX puts in the place of a leaf: nothing is checked.
        new = object.__new__(cls)
        tail, temperature = static
        fields = dict(zip(_LEAVES, leaves, strict=True), tail=tail)
        if temperature is not None:
            fields["temperature"] = temperature
        for name, x in fields.items():
            object.__setattr__(new, name, x)
        return new

    def checked(self, name):
        if name == "student":
            raise TypeError("`student` must be logits or a head, got SparseTeacher.")
        indices = check.int_array(f"{name}.indices", self.indices)
        log_probs = check.float_array(f"{name}.log_probs", self.log_probs)
        if indices.ndim == 0 or indices.shape != log_probs.shape:
            raise ValueError(
                f"`{name}.indices` and `{name}.log_probs` must both be [..., k], got "
                f"{indices.shape} and {log_probs.shape}."
            )
        if indices.shape[-1] == 0:
            raise ValueError(
                f"`{name}.indices` must list a column at least, got k = 0."
            )
        log_rest = self.log_rest
        if log_rest is not None:
            log_rest = check.float_array(f"{name}.log_rest", log_rest)
            shape = indices.shape[:-1]
            check.of_shape(f"{name}.log_rest", log_rest, shape, "the batch shape")
            log_rest = log_rest[..., None]
        eps = float(jnp.finfo(log_probs.dtype).eps)
        return ListSource(indices, log_probs, log_rest, tail=self.tail, eps=eps)


_LEAVES = "indices", "log_probs", "log_rest", "temperature"


def _is_leaf(temperature: Any) -> bool:
    return temperature is not None and not check.is_number(temperature)


_MOST_MASS = 1.02  # of list and rest: above it, these are no probabilities
_WITH_REST = "bucket", "uniform"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ListSource(Source):
    """A `SparseTeacher` that is checked, and later `ready`.

    Then a row has different columns in rising order, and its empty slots have a column
    beyond all others. Its `log_rest` is -inf where the tail has no rest.
    """

    columns: Any  # int32 [B, k]
    log_probs: Any  # [B, k]
    log_rest: Any  # [B, 1]; None: not known yet
    tail: str = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(metadata={"static": True})  # of the list as given
    # Whether the list and its rest are compared as a row of few outcomes. If not, it
    # has a logit for each column.
    is_row: bool = dataclasses.field(default=True, metadata={"static": True})

    kind: ClassVar[Kind] = "list"
    is_normalized: ClassVar[bool] = True

    def checked(self, name):
        del name
        return self

    @property
    def batch_shape(self):
        return self.columns.shape[:-1]

    @property
    def vocab_array(self):
        return None

    @property
    def has_rest(self) -> bool:
        """Whether all unlisted columns together are one more outcome."""
        return self.tail != "conditional"

    @property
    def has_lumped_rest(self) -> bool:
        """Whether the rest is one outcome, though its columns may be compared."""
        return self.tail != "uniform"

    def pad_columns(self, width):
        del width
        return self

    def partition_specs(self, token_axes, vocab_axis):
        del vocab_axis
        return self.map_fields(lambda *_: P(token_axes or None, None))

    def vjp(self, d_outputs, counted):
        del d_outputs, counted
        return self.map_fields(lambda _, x: jnp.zeros_like(x))  # it is a constant

    def with_checked_values(
        self, vocab_size: int, mask: jax.Array | None, is_bad: Any = False
    ) -> "ListSource":
        """The list, once the columns and masses of the tokens in `mask` are known to be
        right.

        Where they are traced and are not, where nothing is listed though the listed
        mass is to be 1, and where the traced `is_bad`, `[B]`, holds, the row is NaN.
        """
        values = _checked(self, vocab_size, mask, is_bad)
        if check.is_known(values.no_column) and (bad := values.no_column).any():
            raise ValueError(
                f"`teacher.indices` must be in [0, {vocab_size}), or -1 for an empty "
                f"slot, got {np.asarray(self.columns)[np.asarray(bad)][0]}."
            )
        if check.is_known(values.too_much) and (heavy := values.too_much).any():
            mass = np.asarray(values.mass)[np.asarray(heavy)][0]
            raise ValueError(
                f'`teacher.log_probs` must have a mass of at most 1 with tail="'
                f'{self.tail}", got {mass:.4g}: they are the log-probabilities of the '
                "whole vocabulary, as `jax.nn.log_softmax(logits / T)` has them. The "
                'tails "renormalize" and "conditional" take any logits.'
            )
        return dataclasses.replace(
            self, columns=values.columns, log_probs=values.log_probs
        )

    def ready(self, dtype, vocab):
        arrays = _ready(self, dtype, vocab.size)
        return dataclasses.replace(self, **arrays)

    def has_column(self, vocab_size: int) -> jax.Array:
        """Whether a slot holds a column, `[B, k]`."""
        return self.columns < vocab_size

    def logits(self, dtype, vocab):
        """Log-probabilities: those of the list and, elsewhere, what the tail says."""
        number = jnp.sum(self.has_column(vocab.size), axis=-1, keepdims=True)
        outside = jnp.maximum(vocab.size - number, 1).astype(dtype)
        others = self.log_rest.astype(dtype) - jnp.log(outside)
        dense = jnp.broadcast_to(others, (others.shape[0], vocab.width))
        if vocab.valid is not None:
            dense = jnp.where(vocab.valid, dense, -jnp.inf)
        at = positions(self.columns, vocab)
        return dense.at[at].set(self.log_probs.astype(dtype), mode="drop")


class _Values(NamedTuple):
    """Of a list, what is wrong with it: bool `[B, k]` and `[B]`, and its arrays with
    NaN in rows where anything is."""

    no_column: jax.Array
    too_much: jax.Array
    mass: jax.Array
    columns: jax.Array
    log_probs: jax.Array


@ft.partial(jax.jit, static_argnums=1, inline=True)
def _checked(
    x: ListSource, vocab_size: int, mask: jax.Array | None, is_bad: Any
) -> _Values:
    columns = x.columns
    counted = jnp.ones(columns.shape[:1], bool) if mask is None else mask
    no_column = ((columns < -1) | (columns >= vocab_size)) & counted[:, None]
    is_nan = no_column.any(axis=-1) | is_bad
    listed = jnp.where(columns == -1, -jnp.inf, x.log_probs)
    mass = jnp.sum(jnp.exp(listed.astype(loss_dtype(listed))), axis=-1)
    if x.log_rest is not None and x.tail in _WITH_REST:
        mass += jnp.exp(x.log_rest[:, 0].astype(mass.dtype))
    if x.tail in ("renormalize", "conditional"):
        too_much = jnp.zeros_like(counted)
        is_nan |= (columns == -1).all(axis=-1)
    else:
        too_much = (mass > _MOST_MASS) & counted
    is_nan = (is_nan | too_much)[:, None]
    # The NaN is put at a column that exists, so that no tail leaves it out.
    columns = jnp.where(is_nan, 0, columns)
    log_probs = jnp.where(is_nan, jnp.nan, x.log_probs)
    return _Values(no_column, too_much, mass, columns, log_probs)


@ft.partial(jax.jit, static_argnums=(1, 2))
def _ready(x: ListSource, dtype: jnp.dtype, vocab_size: int) -> dict[str, jax.Array]:
    columns, log_probs = merge_repeated(x.columns, x.log_probs, dtype)
    has_rest = jnp.sum(columns < vocab_size, axis=-1, keepdims=True) < vocab_size
    if x.tail not in _WITH_REST:
        log_rest = jnp.full_like(log_probs[:, :1], -jnp.inf)
    elif x.log_rest is not None:
        log_rest = x.log_rest.astype(dtype)
    else:
        p = jnp.exp(log_probs)
        finite = zero_unless(p > 0, log_probs)
        # What the rounding of the log-probabilities, and of their exponentials, hides.
        least = x.eps / 2 * jnp.sum(p * (1 - finite), axis=-1)
        log_rest = safe_log(jnp.maximum(unlisted_mass(log_probs), least))[:, None]
    log_rest = jnp.where(has_rest, log_rest, -jnp.inf)
    return dict(columns=columns, log_probs=log_probs, log_rest=log_rest)
