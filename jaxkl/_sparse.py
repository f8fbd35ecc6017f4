"""Teachers given by a few columns of each row: top-k lists and samples."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from . import _checks as check
from ._compat import to_varying, varying_axes
from ._divergences import evaluate, ForwardKL, is_catalogued
from ._numerics import entropy, loss_dtype, normalize, Outcomes, Rows, zero_unless
from ._sources import Source
from ._vocabulary import Vocabulary


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
        repeated add up.
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
            others = _log(_rest(log_probs)[:, None] / outside)
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

    def compare(self, divergence, p, q, vocab):
        if self.tail not in ("drop", "bucket"):
            return super().compare(divergence, p, q, vocab)
        if self.tail == "drop":
            # The listed masses do not sum to 1: the form without cancellation does not
            # hold, and the plain one is right.
            return _plain_kl(p, q)
        listed = self._listed(vocab)
        outcomes = _equal_unless(listed, p, q)
        share = zero_unless(listed, evaluate(divergence, *outcomes))
        unlisted = vocab.mask(~listed)
        (number,) = vocab.sum(jnp.sum(unlisted, axis=-1))
        _, log_probs = self._distinct(p.log.dtype)
        log_p_rest = _log(zero_unless(number > 0, _rest(log_probs)))
        (q_rest,) = vocab.sum(jnp.sum(zero_unless(unlisted, q.prob), axis=-1))
        rest = (Outcomes.of_log(x[:, None]) for x in (log_p_rest, _log(q_rest)))
        outside = evaluate(divergence, *rest)[:, 0]
        return jnp.sum(share, axis=-1) + vocab.once(outside)

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
        is_rest = jnp.sum(columns < vocab.size, axis=-1) < vocab.size
        log_rest = _log(zero_unless(is_rest, _rest(log_p)))
        if self.tail == "renormalize":
            log_rest = jnp.full_like(log_rest, -jnp.inf)
            log_p -= jax.nn.logsumexp(log_p, axis=-1, keepdims=True)
        here = (at[1] < vocab.width) | jnp.isnan(log_p)  # a NaN is of the whole list
        p = Outcomes.of_log(log_p)
        of_list = logits.at[at].get(mode="fill", fill_value=-jnp.inf)
        others = jnp.exp(rows.shifted(logits)).at[at].set(0, mode="drop")
        sums = (
            jnp.sum(others, axis=-1),
            jnp.sum(jnp.exp(rows.shifted(of_list)), axis=-1),
        )
        sum_others, sum_listed = vocab.sum(*sums)
        rows = rows._replace(total=sum_others + sum_listed)
        q = rows.softmax(of_list).outcomes
        # Inside `shard_map`, as all else here: a cast of what is on each device alike
        # would be where its gradients are summed over devices.
        q_rest = to_varying(sum_others / rows.total, varying_axes(of_list))

        def listed(log_q):
            outcomes = _equal_unless(here, p, Outcomes.known(log_q, q.prob))
            if self.tail == "drop":
                return _plain_kl(*outcomes)
            terms = evaluate(divergence, *outcomes)
            return jnp.sum(zero_unless(here, terms), axis=-1)

        def rest(log_q):
            if self.tail == "drop":
                return jnp.zeros_like(log_q)
            pair = Outcomes.of_log(log_rest), Outcomes.known(log_q, q_rest)
            outcomes = _equal_unless(is_rest, *pair)
            return zero_unless(is_rest, evaluate(divergence, *outcomes))

        share, pull = jax.vjp(listed, q.log)
        outside, pull_rest = jax.vjp(rest, _log(q_rest))
        (f_q,), (f_rest,) = pull(jnp.ones_like(share)), pull_rest(jnp.ones_like(share))
        (total,) = vocab.sum(jnp.sum(f_q, axis=-1))
        total += f_rest
        # Each of the others has its part of `f_rest`, by its part of `q_rest`.
        ratio = zero_unless(q_rest > 0, f_rest / jnp.where(q_rest > 0, q_rest, 1))
        inner = others * ((ratio - total) / rows.total)[:, None]
        inner = inner.at[at].add(f_q - q.prob * total[:, None], mode="drop")
        return share + vocab.once(outside), inner

    def entropy(self, p, vocab):
        listed = super().entropy(p, vocab)
        if self.tail != "bucket":
            return listed
        rest = _log(_rest(self._distinct(p.log.dtype)[1]))
        return listed + vocab.once(entropy(Outcomes.of_log(rest[:, None])))

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


def _plain_kl(p, q):
    return jnp.sum(p.prob * zero_unless(p.prob > 0, p.log - q.log), axis=-1)


def _rest(log_probs):
    """The mass that is not listed, `[B]`."""
    return jnp.maximum(1 - jnp.sum(jnp.exp(log_probs), axis=-1), 0)


def _log(x):
    """`log x`; `-inf`, with a gradient of 0, at 0."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


def check_columns(teacher: SparseTeacher, vocab_size: int, mask) -> SparseTeacher:
    """That the columns of the tokens in `mask` exist; NaN, if traced, where not."""
    # Narrow and unsigned dtypes hold neither -1 nor, in general, the vocabulary's size.
    indices = teacher.indices
    if indices.dtype != jnp.int64:
        indices = indices.astype(jnp.int32)
    teacher = dataclasses.replace(teacher, indices=indices)
    bad = (teacher.indices < -1) | (teacher.indices >= vocab_size)
    if mask is not None:
        bad &= mask[:, None]
    if check.is_known(bad):
        if bad.any():
            raise ValueError(
                f"`teacher.indices` must be in [0, {vocab_size}), or -1 for an empty "
                f"slot, got {teacher.indices[bad][0]}."
            )
        return teacher
    any_bad = bad.any(axis=-1, keepdims=True)
    log_probs = jnp.where(any_bad, jnp.nan, teacher.log_probs)
    return dataclasses.replace(teacher, log_probs=log_probs)


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


def top_k_teacher(
    logits, k: int, *, temperature=1.0, tail: Tail = "bucket"
) -> SparseTeacher:
    r"""The `k` most likely columns of each row, $\mathrm{softmax}(t / T)$ there.

    The probabilities are those of the whole softmax: they sum to less than 1, and
    `tail` says what becomes of the rest.

    Args:
      logits: Logits $t$, `[..., vocab]`.
      k: Columns to keep, at most `vocab`.
      temperature: $T > 0$, a scalar or `[...]`.
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
    log_probs = _log_probs(logits, temperature)
    k = check.positive_int("k", k)
    if k > log_probs.shape[-1]:
        raise ValueError(f"`k` must be at most vocab, {log_probs.shape[-1]}, got {k}.")
    values, indices = jax.lax.top_k(log_probs, k)
    return SparseTeacher(indices, values, tail=tail)


def sampled_teacher(key, logits, num_samples: int, *, temperature=1.0) -> SparseTeacher:
    r"""Columns drawn from each row's $p = \mathrm{softmax}(t / T)$, with replacement.

    A column drawn $n$ times has $\hat p = n / \mathrm{num\_samples}$, so that
    $\mathbb{E}[\hat p] = p$: the expected gradient of a forward KL is that of the dense
    teacher, which no top-k list has. Rows are independent.

    Args:
      key: A JAX random key.
      logits: Logits $t$, `[..., vocab]`.
      num_samples: Draws for each row.
      temperature: $T > 0$, a scalar or `[...]`.

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
    p = jnp.exp(_log_probs(logits, temperature))
    # Two draws, of a group of columns and of one in it: float32 uniforms have 24 bits,
    # too few for the rare columns of a large vocabulary.
    *shape, vocab = p.shape
    group = math.isqrt(vocab - 1) + 1
    p = p.reshape(-1, vocab)
    p = jnp.pad(p, ((0, 0), (0, -vocab % group))).reshape(p.shape[0], -1, group)
    outer, inner = jax.random.uniform(key, (2, p.shape[0], num_samples), p.dtype)
    groups = _draw(p.sum(axis=-1), outer)

    def within(row):
        p, at, u = row
        return _draw(p[at], u[:, None])[:, 0]

    columns = jax.lax.map(within, (p, groups, inner), batch_size=64)  # for the memory
    indices = (groups * group + columns).reshape(*shape, num_samples)
    log_probs = jnp.full_like(indices, -math.log(num_samples), dtype=p.dtype)
    return SparseTeacher(indices, log_probs)


def _draw(weights, uniform):
    """Columns of `weights`, `[N, V]`, by inverting their distribution: `[N, S]`."""
    # A parallel sum may round two neighbours apart, and a column of weight 0 must not
    # have a step of its own.
    total = zero_unless(weights > 0, jnp.cumsum(weights, axis=-1))
    total = jax.lax.cummax(total, axis=1)
    # Below the last step even when rounded, so that no column of weight 0 is drawn.
    level = jnp.minimum(uniform * total[:, -1:], jnp.nextafter(total[:, -1:], 0))
    search = jax.vmap(lambda total, level: jnp.searchsorted(total, level, side="right"))
    return search(total, level).astype(jnp.int32)


def _log_probs(logits, temperature):
    """Of `logits / temperature`, in at least float32."""
    logits = check.float_array("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"`logits` must be [..., vocab], got shape {logits.shape}.")
    temperature = check.temperature("temperature", temperature, logits.shape[:-1])
    dtype = loss_dtype(logits, temperature)
    flat = logits.reshape(-1, logits.shape[-1]).astype(dtype)
    if temperature is not None:
        temperature = temperature.astype(dtype).reshape(-1)
    vocab = Vocabulary.whole(logits.shape[-1])
    (rows,) = normalize(vocab, (Rows(jnp.max(flat, axis=-1), temperature), flat))
    return rows.softmax(flat).log.reshape(logits.shape)
