"""Oracle of the distillation losses: NumPy in extended precision, from the equations.

It shares no code with jaxkl. Every sum is the textbook one, `Σ p (log p - log q)`:
`np.longdouble` has digits enough (64 bits on x86) for its cancellation not to matter.
All gradients are closed forms, which `test_oracle.py` checks by central differences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


def _real(x):
    x = np.asarray(x)
    if x.dtype != np.longdouble:
        x = x.astype(np.float64)  # bfloat16 has no direct way to longdouble
    return x.astype(np.longdouble)


def _lse(logits):
    top = np.max(logits, -1, keepdims=True)
    return top + np.log(np.sum(np.exp(logits - top), -1, keepdims=True))


def log_softmax(logits):
    logits = _real(logits)
    return logits - _lse(logits)


def _times(probs, x):
    """`probs * x`, with 0 · anything = 0."""
    return np.where(probs == 0, 0, probs * np.where(probs == 0, 0, x))


# Divergences: `(log_p, log_q) -> f, ∂f/∂log p, ∂f/∂log q`, elementwise.


def forward_kl(log_p, log_q):
    p = np.exp(log_p)
    f = _times(p, log_p - log_q)
    return f, f + p, -p


def _swap(divergence):
    def swapped(log_p, log_q):
        f, f_q, f_p = divergence(log_q, log_p)
        return f, f_p, f_q

    return swapped


reverse_kl = _swap(forward_kl)


def symmetric_kl(weight=0.5):
    def divergence(log_p, log_q):
        forward, reverse = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
        # A side with no weight is absent, even where it is infinite.
        return tuple(
            (weight * a if weight > 0 else 0) + ((1 - weight) * b if weight < 1 else 0)
            for a, b in zip(forward, reverse, strict=True)
        )

    return divergence


def _log_mixture(weight, log_a, log_b):
    """`log(weight · a + (1 - weight) · b)`."""
    return np.logaddexp(
        np.log(np.longdouble(weight)) + log_a, np.log1p(-np.longdouble(weight)) + log_b
    )


def jensen_shannon(beta=0.5, normalized=False):
    if normalized and beta == 0:
        return forward_kl
    if normalized and beta == 1:
        return reverse_kl

    def divergence(log_p, log_q):
        b = np.longdouble(beta)
        log_m = _log_mixture(beta, log_p, log_q)
        f_p = b * _times(np.exp(log_p), log_p - log_m)
        f_q = (1 - b) * _times(np.exp(log_q), log_q - log_m)
        scale = b * (1 - b) if normalized else 1
        return (f_p + f_q) / scale, f_p / scale, f_q / scale

    return divergence


def skew_forward_kl(alpha=0.1):
    def divergence(log_p, log_q):
        a, p = np.longdouble(alpha), np.exp(log_p)
        log_m = _log_mixture(alpha, log_p, log_q)
        f = _times(p, log_p - log_m)
        ratio_p, ratio_q = _times(p, np.exp(log_p - log_m)), np.exp(log_q - log_m)
        return f, f + p - a * ratio_p, -(1 - a) * _times(p, ratio_q)

    return divergence


def skew_reverse_kl(alpha=0.1):
    return _swap(skew_forward_kl(alpha))


def total_variation(log_p, log_q):
    p, q = np.exp(log_p), np.exp(log_q)
    sign = np.sign(p - q)
    return np.abs(p - q) / 2, sign * p / 2, -sign * q / 2


def alpha_divergence(alpha):
    if alpha in (0, 1):
        return forward_kl if alpha == 1 else reverse_kl

    def divergence(log_p, log_q):
        a, p, q = np.longdouble(alpha), np.exp(log_p), np.exp(log_q)
        both_zero = (p == 0) & (q == 0)
        product = np.where(both_zero, 0, np.exp(a * log_p + (1 - a) * log_q))
        scale = a * (a - 1)
        # Σ (a p + (1 - a) q) = 1: the "- 1" of the definition, dealt out to the terms.
        f = (product - a * p - (1 - a) * q) / scale
        return f, (product - p) * a / scale, (product - q) * (1 - a) / scale

    return divergence


def squared_error(log_p, log_q):
    """`(p - q)²`: stands for a user's own divergence."""
    p, q = np.exp(log_p), np.exp(log_q)
    return (p - q) ** 2, 2 * (p - q) * p, -2 * (p - q) * q


class Result(NamedTuple):
    loss: Any
    student: Any
    teacher: Any
    temperature: Any
    teacher_temperature: Any
    weights: Any


def distillation_loss(
    student,
    teacher,
    *,
    divergence: Callable = forward_kl,
    temperature=1.0,
    teacher_temperature=None,
    t_squared=True,
    labels=None,
    alpha=1.0,
    label_smoothing=0.0,
    z_loss=0.0,
    where=None,
    weights=None,
    vocab_size=None,
    reduction="mean",
    normalizer=None,
    cotangent=1.0,
) -> Result:
    """The loss, and `cotangent` pulled back to each float argument."""
    tokens = _Tokens(student, teacher, vocab_size, where, weights)
    T = tokens.per_token(temperature)
    shared = teacher_temperature is None
    Tt = T if shared else tokens.per_token(teacher_temperature)

    with np.errstate(all="ignore"):
        # Token losses and their gradients.
        if alpha == 0:
            loss = d_T = d_Tt = np.zeros_like(T)
            d_s, d_t = np.zeros_like(tokens.student), np.zeros_like(tokens.teacher)
        else:
            D, dz, du = _divergence_and_grad(
                divergence, tokens.student / T[:, None], tokens.teacher / Tt[:, None]
            )
            scale = alpha * (T**2 if t_squared else np.ones_like(T))
            loss = scale * D
            d_s = scale[:, None] * dz / T[:, None]
            d_t = scale[:, None] * du / Tt[:, None]
            d_T = -np.sum(_times(d_s, tokens.student), -1) / T
            d_Tt = -np.sum(_times(d_t, tokens.teacher), -1) / Tt
            if t_squared:
                d_T = d_T + 2 * alpha * T * D
            if shared:
                d_T = d_T + d_Tt
        if alpha != 1:
            ce, d_ce = _cross_entropy(
                tokens.student, tokens.integer(labels), label_smoothing
            )
            loss, d_s = loss + (1 - alpha) * ce, d_s + (1 - alpha) * d_ce
        if z_loss != 0:
            lse = _lse(tokens.student)
            loss = loss + z_loss * lse[:, 0] ** 2
            d_s = d_s + 2 * z_loss * lse * np.exp(tokens.student - lse)

        # Reduction.
        w, g = tokens.weights, _real(cotangent)
        if reduction == "none":
            value = tokens.scatter(w * loss)
            g = tokens.per_token(g)
            d_loss, d_w = g * w, g * loss
        else:
            if reduction == "sum":
                total = np.longdouble(1)
            else:
                total = w.sum() if normalizer is None else _real(normalizer)
            if total == 0:
                value, d_loss, d_w = np.longdouble(0), 0 * w, 0 * w
            else:
                value = np.sum(w * loss) / total
                d_loss, d_w = g * w / total, g * loss / total
                if reduction == "mean" and normalizer is None:
                    d_w = d_w - g * value / total
        rows = d_loss[:, None]
        return Result(
            value,
            tokens.scatter_rows(_times(rows, d_s), np.shape(student)),
            tokens.scatter_rows(_times(rows, d_t), np.shape(teacher)),
            tokens.like(temperature, _times(d_loss, d_T)),
            None if shared else tokens.like(teacher_temperature, _times(d_loss, d_Tt)),
            tokens.scatter(d_w),
        )


class Metrics(NamedTuple):
    divergence: Any
    kl: Any
    cross_entropy: Any
    student_entropy: Any
    teacher_entropy: Any
    top1_agreement: Any
    weight: Any


def metrics(
    student,
    teacher,
    *,
    divergence=forward_kl,
    temperature=1.0,
    teacher_temperature=None,
    labels=None,
    where=None,
    weights=None,
    vocab_size=None,
) -> Metrics:
    """Weighted means over the counted tokens; 0 where nothing counts."""
    tokens = _Tokens(student, teacher, vocab_size, where, weights)
    T = tokens.per_token(temperature)
    Tt = T if teacher_temperature is None else tokens.per_token(teacher_temperature)

    def mean(x, w=tokens.weights):
        return np.sum(w * x) / w.sum() if w.sum() > 0 else np.longdouble(0)

    with np.errstate(all="ignore"):
        s, t = tokens.student, tokens.teacher
        D, _, _ = _divergence_and_grad(divergence, s / T[:, None], t / Tt[:, None])
        kl, _, _ = _divergence_and_grad(forward_kl, s, t)
        log_p, log_q = log_softmax(t), log_softmax(s)
        cross_entropy = None
        if labels is not None:
            labels = tokens.integer(labels)
            ce, _ = _cross_entropy(s, labels, 0.0)
            cross_entropy = mean(ce, tokens.weights * (labels != -100))
        return Metrics(
            mean(D),
            mean(kl),
            cross_entropy,
            mean(-np.sum(_times(np.exp(log_q), log_q), -1)),
            mean(-np.sum(_times(np.exp(log_p), log_p), -1)),
            mean((np.argmax(s, -1) == np.argmax(t, -1)).astype(np.longdouble)),
            tokens.weights.sum(),
        )


def _divergence_and_grad(divergence, student_logits, teacher_logits):
    log_p, log_q = log_softmax(teacher_logits), log_softmax(student_logits)
    f, f_p, f_q = divergence(log_p, log_q)
    dz = f_q - _times(np.exp(log_q), np.sum(f_q, -1, keepdims=True))
    du = f_p - _times(np.exp(log_p), np.sum(f_p, -1, keepdims=True))
    return np.sum(f, -1), dz, du


def _cross_entropy(logits, labels, label_smoothing):
    """Zero, with zero gradient, where the label is -100."""
    vocab = logits.shape[-1]
    log_probs, labelled = log_softmax(logits), labels != -100
    target = np.zeros_like(logits)
    target[labelled, labels[labelled]] = 1
    epsilon = np.longdouble(label_smoothing)
    target = (1 - epsilon) * target + epsilon / vocab
    ce = -np.sum(_times(target, log_probs), -1)
    d_ce = np.exp(log_probs) - target
    return np.where(labelled, ce, 0), np.where(labelled[:, None], d_ce, 0)


class _Tokens:
    """The counted tokens as rows: what `where` drops is sliced away, as are columns."""

    def __init__(self, student, teacher, vocab_size, where, weights):
        self.shape = np.shape(student)[:-1]
        self.kept = np.ones(self.shape, bool) if where is None else np.asarray(where)
        self.student = self.rows(student, vocab_size)
        self.teacher = self.rows(teacher, vocab_size)
        self.weights = self.per_token(1.0 if weights is None else weights)
        self.vocab_size = self.student.shape[-1]

    def rows(self, x, vocab_size):
        return _real(x)[self.kept][:, :vocab_size]

    def per_token(self, x):
        return np.broadcast_to(_real(x), self.shape)[self.kept]

    def integer(self, x):
        return np.asarray(x)[self.kept]

    def scatter(self, x):
        full = np.zeros(self.shape, np.longdouble)
        full[self.kept] = x
        return full

    def scatter_rows(self, x, shape):
        full = np.zeros(shape, np.longdouble)
        full[self.kept, : self.vocab_size] = x
        return full

    def like(self, argument, d_tokens):
        """Sums over the tokens that share a scalar argument."""
        return self.scatter(d_tokens) if np.ndim(argument) else np.sum(d_tokens)


def jacobian(f, x, step=1e-5):
    """Central differences of `f` at `x`, in extended precision: `[*f(x), *x]`."""
    x = _real(x)
    columns = []
    for index in np.ndindex(x.shape):
        h = np.zeros_like(x)
        h[index] = step
        columns.append((_real(f(x + h)) - _real(f(x - h))) / (2 * np.longdouble(step)))
    return np.stack(columns, -1).reshape(columns[0].shape + x.shape)
