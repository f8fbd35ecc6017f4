"""Teachers given by a few columns of each row: top-k lists and samples."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from . import _checks as check
from ._compat import to_varying, varying_axes
from ._divergences import evaluate, ForwardKL, is_catalogued
from ._numerics import centred, entropy, Outcomes, sums, zero_unless
from ._sources import Source


Tail = Literal["renormalize", "drop", "bucket", "uniform"]
TAILS = ("renormalize", "drop", "bucket", "uniform")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseTeacher(Source):
    r"""A teacher known by the log-probabilities of `k` columns in each row.

    Let $L$ be the listed columns, $p$ their probabilities and
    $\rho = 1 - \sum_L p$ the rest of the mass. The tail says what becomes of it:

    - `"renormalize"`: the listed mass is scaled to 1 and $p = 0$ elsewhere, so any
      unnormalised values will do. Biased, and refused by divergences that are infinite
      where $p = 0 < q$, `ReverseKL` among them.
    - `"drop"`: $\sum_L p \log (p / q)$, columns outside $L$ left out. `ForwardKL` only.
      Its value may be negative.
    - `"bucket"`: the rest is one more outcome, of probability $\rho$ in the teacher and
      $1 - \sum_L q$ in the student.
    - `"uniform"`: $\rho$ is spread evenly over the columns outside $L$.

    The log-probabilities are at the teacher's temperature already: `temperature` of a
    loss divides the student's logits only. They are constants to differentiation. With
    all columns listed, each tail gives the loss of the dense teacher.

    Args:
      indices: Columns, integers `[..., k]`. -1 is an empty slot; columns that are
        repeated add up. Where all slots of a token are empty, there is nothing to
        renormalize, and its loss is NaN.
      log_probs: Their log-probabilities, `[..., k]`.
      tail: What becomes of the mass that is not listed.

    References:
      Anshumann et al. [Sparse Logit Sampling: Accelerating Knowledge Distillation in
      LLMs](https://arxiv.org/abs/2503.16870), 2025.
    """

    indices: Any
    log_probs: Any
    tail: Tail = dataclasses.field(
        default="renormalize", kw_only=True, metadata={"static": True}
    )

    def __post_init__(self):
        check.one_of("tail", self.tail, TAILS)

    def pad_columns(self, width):
        del width
        return self

    def specs(self, token_axes, vocab_axis):
        return self.map_fields(lambda *_: P(token_axes or None, None))

    def logits(self, dtype, vocab):
        """Log-probabilities: the softmax is done, on the list alone."""
        columns, log_probs = self._distinct(dtype)
        others = jnp.full_like(log_probs[:, :1], -jnp.inf)
        total = jax.nn.logsumexp(log_probs, axis=-1, keepdims=True)
        if self.tail == "renormalize":
            log_probs -= total
            others = jnp.where(total == -jnp.inf, jnp.nan, others)
        elif self.tail == "uniform":
            number = jnp.sum(columns < vocab.size, axis=-1, keepdims=True)
            outside = jnp.maximum(vocab.size - number, 1).astype(dtype)
            others = _log(_unlisted(log_probs)[:, None] / outside)
            log_probs -= jnp.maximum(total, 0)  # rounded values may sum to more than 1
        dense = jnp.broadcast_to(others, (others.shape[0], vocab.width))
        if vocab.valid is not None:
            dense = jnp.where(vocab.valid, dense, -jnp.inf)
        return dense.at[self._slots(columns, vocab)].set(log_probs, mode="drop")

    def pull(self, logits, d_logits, live):
        return self.map_fields(lambda _, x: jnp.zeros_like(x))  # a constant

    @property
    def is_normalized(self):
        return True

    def compare(self, divergence, p, q, vocab, log_ratio=None):
        if self.tail not in ("drop", "bucket"):
            return super().compare(divergence, p, q, vocab, log_ratio)
        if self.tail == "drop":
            # The listed masses do not sum to 1: the form without cancellation does not
            # hold, and the plain one is right.
            return _plain_kl(p, q)
        listed = self._listed(vocab)
        share = jnp.sum(_evaluate_where(listed, divergence, p, q), axis=-1)
        unlisted = vocab.mask(~listed)
        (q_rest,) = vocab.sum(jnp.sum(zero_unless(unlisted, q.prob), axis=-1))
        has_rest, p_rest = self._rest(*self._distinct(p.log.dtype), vocab)
        q_rest = Outcomes.of_log(_log(q_rest))
        outside = _evaluate_where(has_rest, divergence, p_rest, q_rest)
        return share + vocab.once(outside)

    def against(self, divergence, rows, logits, vocab):
        r"""On the list, with all other columns as one.

        The tail `"bucket"` says so. Where $p = 0$ it is the same in sum, as
        $f(0, q) = q\,f(0, 1)$: divergences are homogeneous of degree 1. Not so a user's
        function, nor a tail with a probability of its own for each column.
        """
        is_lumped = self.tail != "renormalize" or is_catalogued(divergence)
        if self.tail == "uniform" or not is_lumped:
            return None
        columns, log_p = self._distinct(logits.dtype)
        at = self._slots(columns, vocab)
        has_rest, p_rest = self._rest(columns, log_p, vocab)
        if self.tail == "renormalize":
            log_p -= jax.nn.logsumexp(log_p, axis=-1, keepdims=True)
        here = at[1] < vocab.width
        p = Outcomes.of_log(log_p)

        listed = logits.at[at].get(mode="fill", fill_value=-jnp.inf)
        others = jnp.exp(rows.shifted(logits)).at[at].set(0, mode="drop")
        exp_listed = jnp.exp(rows.shifted(listed))
        others_sum = jnp.sum(others, axis=-1)
        others_sum, listed_sum = vocab.sum(others_sum, jnp.sum(exp_listed, axis=-1))
        rows = rows._replace(total=others_sum + listed_sum)
        q = rows.softmax(listed).outcomes
        # Inside `shard_map`, as all else here: a cast of what is on each device alike
        # would be where its gradients are summed over devices.
        q_listed, q_rest = (
            to_varying(x / rows.total, varying_axes(listed))
            for x in (listed_sum, others_sum)
        )

        def compare(log_q, log_q_rest):
            of_list = p, Outcomes.known(log_q, q.prob)
            of_rest = p_rest, Outcomes.known(log_q_rest, q_rest)
            if self.tail == "drop":
                plain = _plain_kl(*_equal_unless(here, *of_list))
                return plain, jnp.zeros_like(log_q_rest)
            share = jnp.sum(_evaluate_where(here, divergence, *of_list), axis=-1)
            return share, _evaluate_where(has_rest, divergence, *of_rest)

        (share, outside), pull = jax.vjp(compare, q.log, _log(q_rest))
        f_q, f_rest = pull((jnp.ones_like(share), jnp.ones_like(outside)))
        of_list, f_others, q_others = sums(vocab, f_q, q.prob)
        total = of_list + f_rest
        d_listed = centred(f_q, q.prob, total, f_others + f_rest, q_others + q_rest)
        f_rest, q_rest = f_rest[:, None], q_rest[:, None]
        d_rest = centred(f_rest, q_rest, total, of_list, q_listed)
        # Each of the others has its part of `d_rest`, by its part of `q_rest`.
        part = zero_unless(others_sum > 0, 1 / jnp.where(others_sum > 0, others_sum, 1))
        inner = others * (part[:, None] * d_rest)
        return share + vocab.once(outside), inner.at[at].add(d_listed, mode="drop")

    def entropy(self, p, vocab):
        listed = super().entropy(p, vocab)
        if self.tail != "bucket":
            return listed
        _, rest = self._rest(*self._distinct(p.log.dtype), vocab)
        rest = Outcomes(*(x[:, None] for x in rest))
        return listed + vocab.once(entropy(rest))

    def _distinct(self, dtype):
        """Columns and log-probabilities, `[B, k]`, repeated ones added up. Slots that
        are left over have a column beyond all others, and `-inf`."""
        none = jnp.iinfo(self.indices.dtype).max
        empty = self.indices < 0
        columns = jnp.where(empty, none, self.indices)
        log_probs = jnp.where(empty, -jnp.inf, self.log_probs.astype(dtype))
        columns, log_probs = jax.lax.sort((columns, log_probs), num_keys=1)
        new = columns[:, 1:] != columns[:, :-1]
        place = jnp.cumsum(jnp.pad(new, ((0, 0), (1, 0))), axis=-1)
        at = jnp.arange(place.shape[0])[:, None], place
        # The largest of a column, then the sum relative to it: exact for a single one.
        top = jnp.full_like(log_probs, -jnp.inf).at[at].max(log_probs)
        share = zero_unless(log_probs > -jnp.inf, jnp.exp(log_probs - top[at]))
        total = jnp.zeros_like(log_probs).at[at].add(share)
        columns = jnp.full_like(columns, none).at[at].set(columns)
        return columns, top + jnp.log(jnp.maximum(total, 1))

    def _rest(self, columns, log_probs, vocab):
        """Whether any column is not listed, and all these as one outcome, `[B]`."""
        has_rest = jnp.sum(columns < vocab.size, axis=-1) < vocab.size
        mass = zero_unless(
            has_rest & (self.tail != "renormalize"), _unlisted(log_probs)
        )
        return has_rest, Outcomes.of_log(_log(mass))

    def _slots(self, columns, vocab):
        """Where columns are in a tile, those of no column here out of bounds."""
        rows = jnp.arange(columns.shape[0])[:, None]
        local = columns - jnp.asarray(vocab.start, columns.dtype)
        here = (columns >= 0) & (local >= 0) & (local < vocab.width)
        return rows, jnp.where(here, local, vocab.width)

    def _listed(self, vocab):
        shape = (self.indices.shape[0], vocab.width)
        at = self._slots(self.indices, vocab)
        return jnp.zeros(shape, bool).at[at].set(True, mode="drop")


def _equal_unless(condition, *models):
    """Elsewhere equal outcomes, of which divergences are 0: of two that neither model
    has, a user's function may be NaN."""
    return [Outcomes(*(zero_unless(condition, y) for y in x)) for x in models]


def _evaluate_where(condition, divergence, p, q):
    """`f(log p, log q)` where `condition`, of nothing else, and 0 elsewhere."""
    p, q = _equal_unless(condition, p, q)
    return zero_unless(condition, evaluate(divergence, p, q))


def _plain_kl(p, q):
    return jnp.sum(p.prob * zero_unless(p.prob > 0, p.log - q.log), axis=-1)


def _unlisted(log_probs):
    """The mass that is not listed, `[B]`."""
    # Beside a nearly certain column it has no digits in 1 - Σ p, but in 1 - p of that.
    at_top = jax.nn.one_hot(jnp.argmax(log_probs, -1), log_probs.shape[-1], dtype=bool)
    top = jnp.max(log_probs, axis=-1)
    others = jnp.sum(zero_unless(~at_top, jnp.exp(log_probs)), axis=-1)
    return jnp.maximum(-jnp.expm1(top) - others, 0)


def _log(x):
    """`log x`; `-inf`, with a gradient of 0, at 0."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


def check_columns(teacher: SparseTeacher, vocab_size: int, mask) -> SparseTeacher:
    """That the columns of the tokens in `mask` exist; NaN, if traced, where not, and
    where none is listed though the listed mass is to be 1."""
    indices = teacher.indices
    is_bad = (indices < -1) | (indices >= vocab_size)
    if mask is not None:
        is_bad &= mask[:, None]
    if check.is_known(is_bad) and is_bad.any():
        raise ValueError(
            f"`teacher.indices` must be in [0, {vocab_size}), or -1 for an empty "
            f"slot, got {indices[is_bad][0]}."
        )
    is_nan = is_bad.any(axis=-1, keepdims=True)
    if teacher.tail == "renormalize":
        is_nan |= (indices == -1).all(axis=-1, keepdims=True)
    # Where there is a column, so that none of the tails leaves the NaN out.
    indices = jnp.where(is_nan, 0, indices)
    log_probs = jnp.where(is_nan, jnp.nan, teacher.log_probs)
    return dataclasses.replace(teacher, indices=indices, log_probs=log_probs)


def check_tail(divergence, teacher: SparseTeacher) -> None:
    """That the divergence has a meaning on the teacher's tail."""
    if teacher.tail == "drop" and not isinstance(divergence, ForwardKL):
        raise ValueError(
            f'`divergence` must be ForwardKL() with tail="drop", got {divergence!r}.'
        )
    if teacher.tail != "renormalize":
        return
    with jax.ensure_compile_time_eval():
        f = divergence(jnp.full((1, 1), -jnp.inf), jnp.log(jnp.full((1, 1), 0.5)))
        finite = bool(jnp.isfinite(f).all())
    if not finite:
        raise ValueError(
            f"`divergence` {divergence!r} is not finite where p = 0, as it is outside "
            'the list with tail="renormalize". Take tail="bucket" or "uniform", or a '
            "divergence that is finite there, such as ForwardKL, SkewForwardKL, "
            "JensenShannon or TotalVariation."
        )
