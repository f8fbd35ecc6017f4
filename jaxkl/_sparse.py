"""Teachers given by a few columns of each row: top-k lists and samples."""

import dataclasses
from typing import ClassVar, Literal, TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from . import _checks as check
from ._divergences import Divergence, ForwardKL, is_catalogued
from ._list_comparison import evaluate_where, List, plain_kl
from ._lists import is_listed, merge_repeated, positions, safe_log, unlisted_mass
from ._numerics import zero_unless
from ._parameters import with_numbers
from ._softmax import entropy, Model, Outcomes
from ._sources import Kind, Source
from ._vocabulary import Vocabulary


Tail = Literal["renormalize", "drop", "bucket", "uniform", "conditional"]
TAILS = ("renormalize", "drop", "bucket", "uniform", "conditional")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseTeacher(Source):
    r"""A teacher known by the log-probabilities of `k` columns in each row.

    Let $L$ be the listed columns, $p$ their probabilities and
    $\rho = 1 - \sum_L p$ the rest of the mass. The tail says what becomes of it:

    - `"renormalize"`: the listed mass is scaled to 1 and $p = 0$ elsewhere, so the
      values need not be normalised. It is biased. Divergences that are infinite where
      $p = 0 < q$, such as `ReverseKL`, refuse it.
    - `"drop"`: the loss is $\sum_L p \log (p / q)$, without the columns outside $L$.
      For `ForwardKL` only; the value may be negative.
    - `"bucket"`: the rest is one more outcome, of probability $\rho$ in the teacher and
      $1 - \sum_L q$ in the student.
    - `"uniform"`: $\rho$ is spread evenly over the columns outside $L$.
    - `"conditional"`: both models are taken given that the outcome is in $L$. The
      listed mass is scaled to 1, and the student is
      $q_v = e^{z_v} / \sum_{w \in L} e^{z_w}$, a softmax over the listed columns alone.
      The other logits have no influence, and a gradient of 0: nothing teaches the
      student to leave mass in the list. Any divergence has a meaning.

    The log-probabilities are at the teacher's temperature already: the `temperature` of
    a loss divides the student's logits only. They are constants to differentiation. If
    all columns are listed, each tail gives the loss of the dense teacher.

    Args:
      indices: Columns, integers `[..., k]`. -1 is an empty slot, and repeated columns
        add up. A token whose slots are all empty has nothing to renormalize, and
        nothing that is given: its loss is NaN.
      log_probs: The log-probabilities of these columns, `[..., k]`.
      tail: What becomes of the mass that is not listed.

    References:
      Anshumann et al. [Sparse Logit Sampling: Accelerating Knowledge Distillation in
      LLMs](https://arxiv.org/abs/2503.16870), 2025.
    """

    indices: jax.Array
    log_probs: jax.Array
    tail: Tail = dataclasses.field(
        default="renormalize", kw_only=True, metadata={"static": True}
    )

    kind: ClassVar[Kind] = "list"
    is_normalized: ClassVar[bool] = True

    if TYPE_CHECKING:

        def __init__(
            self,
            indices: ArrayLike,
            log_probs: ArrayLike,
            *,
            tail: Tail = "renormalize",
        ) -> None: ...

    def __post_init__(self):
        check.one_of("tail", self.tail, TAILS)

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
        kind = _ConditionalList if self.tail == "conditional" else SparseTeacher
        return kind(indices, log_probs, tail=self.tail)

    @property
    def batch_shape(self):
        return self.indices.shape[:-1]

    @property
    def vocab_array(self):
        return None

    def pad_columns(self, width):
        del width
        return self

    def partition_specs(self, token_axes, vocab_axis):
        del vocab_axis
        return self.map_fields(lambda *_: P(token_axes or None, None))

    def checked_as_teacher(
        self, divergence, vocab_size, mask, *, teacher_temperature, differentiate
    ):
        if teacher_temperature is not None:
            raise ValueError(
                "`teacher_temperature` must be None with a SparseTeacher, whose "
                "log-probabilities are at its own temperature already; got "
                f"{teacher_temperature!r}."
            )
        if differentiate:
            raise ValueError(
                "`differentiate_teacher` must be False with a SparseTeacher, which is "
                "a constant."
            )
        _check_tail(self.tail, divergence)
        return self._with_checked_columns(vocab_size, mask)

    def logits(self, dtype, vocab):
        """Log-probabilities: those of the list and, elsewhere, what the tail says."""
        columns, log_probs = self.entries(dtype)
        others = jnp.full_like(log_probs[:, :1], -jnp.inf)
        total = jax.nn.logsumexp(log_probs, axis=-1, keepdims=True)
        if self.tail in ("renormalize", "conditional"):
            log_probs -= total
            others = jnp.where(total == -jnp.inf, jnp.nan, others)
        elif self.tail == "uniform":
            number = jnp.sum(columns < vocab.size, axis=-1, keepdims=True)
            outside = jnp.maximum(vocab.size - number, 1).astype(dtype)
            others = safe_log(unlisted_mass(log_probs)[:, None] / outside)
            log_probs -= jnp.maximum(total, 0)  # rounded values may sum to more than 1
        dense = jnp.broadcast_to(others, (others.shape[0], vocab.width))
        if vocab.valid is not None:
            dense = jnp.where(vocab.valid, dense, -jnp.inf)
        return dense.at[positions(columns, vocab)].set(log_probs, mode="drop")

    def vjp(self, d_outputs, counted):
        del d_outputs, counted
        return self.map_fields(lambda _, x: jnp.zeros_like(x))  # it is a constant

    def list_sums(
        self, student: Model, vocab: Vocabulary
    ) -> tuple[jax.Array, jax.Array] | None:
        return self._list(student.logits.dtype, vocab).sums(student, vocab)

    def divergence_of(self, divergence, p, q, vocab, q_unlisted=None):
        if self.tail not in ("drop", "bucket"):
            return self.sum_terms(divergence, p, q, vocab)
        if self.tail == "drop":
            return plain_kl(p, q)
        listed = is_listed(self.indices, vocab)
        of_list = jnp.sum(evaluate_where(listed, divergence, p, q), axis=-1)
        has_rest, p_rest = self._rest(*self.entries(p.log.dtype), vocab)
        if q_unlisted is None:
            q_unlisted = jnp.sum(zero_unless(vocab.mask(~listed), q.prob), axis=-1)
        q_rest = Outcomes.of_log(safe_log(q_unlisted))
        of_rest = evaluate_where(has_rest, divergence, p_rest, q_rest)
        return of_list + vocab.on_first_shard(of_rest)

    def sums_of_slopes(self, divergence, pair, vocab):
        if not self._is_lumped(divergence):
            return super().sums_of_slopes(divergence, pair, vocab)
        entries = self._list(pair.student.logits.dtype, vocab)
        return entries.sums_of_slopes(divergence, pair, vocab)

    def compare(self, divergence, pair, vocab, sums, *, recompute):
        r"""Compares the columns of the list, and all others as one outcome.

        The tail `"bucket"` is defined so, and with `"drop"` the others have no term.
        With `"renormalize"` their sum is the same, as $p = 0$ and
        $f(0, q) = q\,f(0, 1)$: divergences are homogeneous of degree 1. A user's
        function need not be. With `"uniform"`, each of the other columns has a
        probability of its own.
        """
        if not self._is_lumped(divergence):
            return super().compare(divergence, pair, vocab, sums, recompute=recompute)
        entries = self._list(pair.student.logits.dtype, vocab)
        return entries.compare(divergence, pair, vocab, sums)

    def _is_lumped(self, divergence: Divergence) -> bool:
        """Whether the columns outside the list are compared as one outcome."""
        if self.tail == "uniform":
            return False
        return self.tail != "renormalize" or is_catalogued(divergence)

    def _list(self, dtype: jnp.dtype, vocab: Vocabulary) -> List:
        columns, log_p = self.entries(dtype)
        rest = self._rest(columns, log_p, vocab)
        if self.tail == "renormalize":
            log_p -= jax.nn.logsumexp(log_p, axis=-1, keepdims=True)
        return List(columns, log_p, *rest, self.tail == "drop")

    def entropy(self, p, vocab):
        of_list = super().entropy(p, vocab)
        if self.tail != "bucket":
            return of_list
        _, rest = self._rest(*self.entries(p.log.dtype), vocab)
        rest = Outcomes(*(x[:, None] for x in rest))
        return of_list + vocab.on_first_shard(entropy(rest))

    def entries(self, dtype):
        return merge_repeated(self.indices, self.log_probs, dtype)

    def _rest(
        self, columns: jax.Array, log_probs: jax.Array, vocab: Vocabulary
    ) -> tuple[jax.Array, Outcomes]:
        """Whether a list leaves out any column, and all these as one outcome, `[B]`."""
        has_rest = jnp.sum(columns < vocab.size, axis=-1) < vocab.size
        has_mass = has_rest & (self.tail != "renormalize")
        mass = zero_unless(has_mass, unlisted_mass(log_probs))
        return has_rest, Outcomes.of_log(safe_log(mass))

    def _with_checked_columns(
        self, vocab_size: int, mask: jax.Array | None
    ) -> "SparseTeacher":
        """The list, once the columns of the tokens in `mask` are known to exist.

        Where they are traced and do not exist, and where nothing is listed though the
        listed mass is to be 1, the row becomes NaN.
        """
        indices = self.indices
        is_bad = (indices < -1) | (indices >= vocab_size)
        if mask is not None:
            is_bad &= mask[:, None]
        if check.is_known(is_bad) and is_bad.any():
            raise ValueError(
                f"`teacher.indices` must be in [0, {vocab_size}), or -1 for an empty "
                f"slot, got {indices[is_bad][0]}."
            )
        is_nan = is_bad.any(axis=-1, keepdims=True)
        if self.tail in ("renormalize", "conditional"):
            is_nan |= (indices == -1).all(axis=-1, keepdims=True)
        # The NaN is put at a column that exists, so that no tail leaves it out.
        indices = jnp.where(is_nan, 0, indices)
        log_probs = jnp.where(is_nan, jnp.nan, self.log_probs)
        return dataclasses.replace(self, indices=indices, log_probs=log_probs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _ConditionalList(SparseTeacher):
    """A list whose columns alone are outcomes, of both models.

    The listed columns are compared as a vocabulary of their own, `[B, k]`.
    """

    def on_list(self, student, vocab):
        columns, log_probs = self.entries(student.dtype)
        at = positions(columns, vocab)
        log_p = jnp.where(_is_here(at, vocab), log_probs, -jnp.inf)
        return log_p, student.at[at].get(mode="fill", fill_value=-jnp.inf)

    def off_list(self, d_listed, vocab):
        columns, _ = self.entries(d_listed.dtype)
        d_logits = jnp.zeros((d_listed.shape[0], vocab.width), d_listed.dtype)
        return d_logits.at[positions(columns, vocab)].set(d_listed, mode="drop")

    def sum_terms(self, divergence, p, q, vocab, log_ratio=None):
        columns, _ = self.entries(p.log.dtype)
        is_here = _is_here(positions(columns, vocab), vocab)
        terms = evaluate_where(is_here, divergence, p, q, log_ratio)
        return jnp.sum(terms, axis=-1)

    def divergence_of(self, divergence, p, q, vocab, q_unlisted=None):
        """From the softmax of all columns, all of which are at hand."""
        listed: tuple[jax.Array, jax.Array] = self.on_list(q.log, vocab)
        p, q = (Outcomes.of_log(jax.nn.log_softmax(x, axis=-1)) for x in listed)
        return self.sum_terms(divergence, p, q, vocab)

    def list_sums(self, student, vocab):
        return None

    def _is_lumped(self, divergence):
        return False


def _is_here(at: tuple[jax.Array, jax.Array], vocab: Vocabulary) -> jax.Array:
    """Whether `positions` are columns at hand, `[B, k]`."""
    return at[1] < vocab.width


def _check_tail(tail: Tail, divergence: Divergence) -> None:
    """Checks that the divergence has a meaning on the tail."""
    is_forward_kl = isinstance(divergence, ForwardKL) and is_catalogued(divergence)
    if tail == "drop" and not is_forward_kl:
        raise ValueError(
            f'`divergence` must be ForwardKL() with tail="drop", got {divergence!r}.'
        )
    if tail != "renormalize":
        return
    with jax.ensure_compile_time_eval():
        # Arrays are not known. They most often hold no end of their interval.
        f = with_numbers(divergence)
        f = f(jnp.full((1, 1), -jnp.inf), jnp.log(jnp.full((1, 1), 0.5)))
        finite = bool(jnp.isfinite(f).all())
    if not finite:
        raise ValueError(
            f"`divergence` {divergence!r} is not finite where p = 0, as it is outside "
            'the list with tail="renormalize". Take tail="bucket" or "uniform", or a '
            "divergence that is finite there, such as ForwardKL, SkewForwardKL, "
            "JensenShannon or TotalVariation."
        )
