"""Oracle of the distillation losses: NumPy in extended precision, from the equations.

It shares no code with jaxkl. `np.longdouble` has 64 bits on x86, and no term is a
difference of numbers that are nearly equal: equal models give exactly 0, on every
processor, and confident rows, high temperatures and small β keep their digits.
All gradients are closed forms, which `test_oracle.py` checks by central differences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


# A sum of numbers of order one may leave this much of a true 0.
ROUNDING = 1e-17


def _real(x):
    x = np.asarray(x)
    if x.dtype != np.longdouble:
        x = x.astype(np.float64)  # bfloat16 has no direct way to longdouble
    return x.astype(np.longdouble)


def _at_top(logits):
    """Whether an entry is the largest of its row, or the first of several."""
    top = np.argmax(logits, -1, keepdims=True)
    return np.arange(logits.shape[-1]) == top


def _shifted_and_log_sum(logits):
    """Logits less the largest, and the log of the sum of their exponentials."""
    shifted = logits - np.max(logits, -1, keepdims=True)
    # The largest entry is 0 here, or NaN where it is infinite.
    others = np.where(_at_top(logits), shifted, np.exp(shifted))
    return shifted, np.log1p(np.sum(others, -1, keepdims=True))


def log_softmax(logits):
    shifted, log_sum = _shifted_and_log_sum(_real(logits))
    return shifted - log_sum


def _lse(logits):
    _, log_sum = _shifted_and_log_sum(logits)
    return np.max(logits, -1, keepdims=True) + log_sum


def _times(probs, x):
    """`probs * x`, with 0 · anything = 0."""
    return np.where(probs == 0, 0, probs * np.where(probs == 0, 0, x))


def _log_ratio(log_p, log_q):
    """`log(p / q)`: 0 where both are 0."""
    return np.where(log_p == log_q, 0, log_p - log_q)


def _difference(log_p, log_q):
    """`p - q`."""
    x = _log_ratio(log_p, log_q)
    larger = np.exp(np.maximum(log_p, log_q))
    return -np.sign(x) * larger * np.expm1(-np.abs(x))


# A divergence maps `(log_p, log_q)` to `f, ∂f/∂log p, ∂f/∂log q`, elementwise. Each
# term has a multiple of `q - p` added, which makes it non-negative and sums to 0.


def _power_series(x, c):
    """`Σ xᵏ/k! · (1 + c + … + cᵏ⁻²)` for k ≥ 2, to full precision where x is small."""
    total, power, slope = np.zeros_like(x), x, np.longdouble(0)
    for k in range(2, 26):
        power, slope = power * x / k, 1 + c * slope
        total = total + power * slope
    return total


def _excess(p, q, x):
    """`p log(p / q) - p + q`, where x is log(q / p)."""
    near = np.abs(x) < 0.5
    series = p * _power_series(np.where(near, x, 0), 0)
    return np.where(near, series, q - p - _times(p, x))


def forward_kl(log_p, log_q):
    p, q, x = np.exp(log_p), np.exp(log_q), _log_ratio(log_q, log_p)
    return _excess(p, q, x), -_times(p, x), _difference(log_q, log_p)


def _swap(divergence):
    def swapped(log_p, log_q):
        f, f_q, f_p = divergence(log_q, log_p)
        return f, f_p, f_q

    return swapped


reverse_kl = _swap(forward_kl)


def symmetric_kl(weight=0.5):
    def divergence(log_p, log_q):
        forward, reverse = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
        # A side without weight plays no part, even where it is infinite.
        return tuple(
            (weight * a if weight > 0 else 0) + ((1 - weight) * b if weight < 1 else 0)
            for a, b in zip(forward, reverse, strict=True)
        )

    return divergence


def _log_mixture(weight, other, x):
    """`log(weight + other eˣ)`, with weights that add up to 1."""
    step = other * np.expm1(x)
    near = np.log1p(np.maximum(step, -0.5))
    plain = np.log(weight + other * np.exp(x))
    beyond = x + np.log(weight * np.exp(-x) + other)
    return np.where(np.isposinf(step), beyond, np.where(step > -0.5, near, plain))


def jensen_shannon(beta=0.5, normalized=False):
    if normalized and beta == 0:
        return forward_kl
    if normalized and beta == 1:
        return reverse_kl

    def divergence(log_p, log_q):
        b, x = np.longdouble(beta), _log_ratio(log_q, log_p)
        p, q = np.exp(log_p), np.exp(log_q)
        mixture = b * p + (1 - b) * q
        to_p, to_q = _log_mixture(b, 1 - b, x), _log_mixture(1 - b, b, -x)
        f = b * _excess(p, mixture, to_p) + (1 - b) * _excess(q, mixture, to_q)
        f_p, f_q = -b * _times(p, to_p), -(1 - b) * _times(q, to_q)
        scale = b * (1 - b) if normalized else 1
        return f / scale, f_p / scale, f_q / scale

    return divergence


def skew_forward_kl(alpha=0.1):
    if alpha == 0:
        return forward_kl

    def divergence(log_p, log_q):
        a, p, q = np.longdouble(alpha), np.exp(log_p), np.exp(log_q)
        x = _log_mixture(a, 1 - a, _log_ratio(log_q, log_p))
        gap = -np.expm1(-x)  # 1 - p / mixture
        slope = np.where(
            np.abs(x) < 0.5, -_power_series(-x, 0) - (1 - a) * gap, a * gap - x
        )
        f = _excess(p, a * p + (1 - a) * q, x)
        return f, _times(p, slope), (1 - a) * _times(q, gap)

    return divergence


def skew_reverse_kl(alpha=0.1):
    return _swap(skew_forward_kl(alpha))


def total_variation(log_p, log_q):
    difference, sign = _difference(log_p, log_q), np.sign(_log_ratio(log_p, log_q))
    return np.abs(difference) / 2, sign * np.exp(log_p) / 2, -sign * np.exp(log_q) / 2


def alpha_divergence(alpha):
    if alpha in (0, 1):
        return forward_kl if alpha == 1 else reverse_kl

    def divergence(log_p, log_q):
        a, p, q = np.longdouble(alpha), np.exp(log_p), np.exp(log_q)
        c, x = 1 - a, _log_ratio(log_q, log_p)
        both_zero = (p == 0) & (q == 0)
        product = np.where(both_zero, 0, np.exp(a * log_p + c * log_q))  # pᵃ q¹⁻ᵃ
        less = lambda p, y: np.where(np.abs(y) < 1, p * np.expm1(y), product - p)
        f_p, f_q = -less(p, c * x) / c, -less(q, -a * x) / a
        near = np.abs(x) < 0.5 / max(1, abs(c))
        series = p * _power_series(np.where(near, x, 0), c)
        f = np.where(np.isposinf(product), product, f_p + f_q)
        return np.where(near, series, f), f_p, f_q

    return divergence


def squared_error(log_p, log_q):
    """`(p - q)²` stands for a user's own divergence."""
    d = _difference(log_p, log_q)
    return d**2, 2 * d * np.exp(log_p), -2 * d * np.exp(log_q)


def mixture(*terms):
    """Of pairs of a weight and a divergence; one without weight plays no part."""

    def divergence(log_p, log_q):
        parts = [(np.longdouble(w), f(log_p, log_q)) for w, f in terms if w != 0]
        return tuple(sum(w * part[i] for w, part in parts) for i in range(3))

    return divergence


class by_token(NamedTuple):
    """A divergence of its own for each row."""

    divergences: Any

    def __call__(self, log_p, log_q):
        rows = zip(self.divergences, log_p, log_q, strict=True)
        parts = [f(p, q) for f, p, q in rows]
        return tuple(map(np.stack, zip(*parts, strict=True)))


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
    """The loss, and `cotangent` pulled back to each float argument.

    The teacher is logits, or a list: it has `indices`, `log_probs`, `log_rest` and a
    `tail`, and its own temperature.
    """
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
            D, dz, du = tokens.divergence_and_grad(divergence, T, Tt)
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
            tokens.scatter_rows(_times(rows, d_t), tokens.teacher_shape),
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
    teacher_listed_mass: Any
    student_listed_mass: Any
    top_k_overlap: Any
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
    """Weighted means over the counted tokens; 0 where nothing counts.

    Beside a list, all but the cross-entropy and the top 1 are at the loss's temperature
    and of the outcomes that are compared.
    """
    tokens = _Tokens(student, teacher, vocab_size, where, weights)
    T = tokens.per_token(temperature)
    Tt = T if teacher_temperature is None else tokens.per_token(teacher_temperature)

    def mean(x, w=tokens.weights):
        return np.sum(w * x) / w.sum() if w.sum() > 0 else np.longdouble(0)

    with np.errstate(all="ignore"):
        s, top1 = tokens.student, np.argmax(tokens.student, -1)
        D, _, _ = tokens.divergence_and_grad(divergence, T, Tt)
        cross_entropy = None
        if labels is not None:
            labels = tokens.integer(labels)
            ce, _ = _cross_entropy(s, labels, 0.0)
            cross_entropy = mean(ce, tokens.weights * (labels != -100))
        p_listed = q_listed = overlap = None
        if tokens.list is None:
            log_p, log_q = log_softmax(tokens.teacher), log_softmax(s)
            kl, _, _ = tokens.divergence_and_grad(forward_kl, *np.ones_like([T, Tt]))
            top1_of_teacher = np.argmax(log_p, -1)
        else:
            kl, _, _ = tokens.divergence_and_grad(forward_kl, T, Tt)
            log_p, log_q, of_rows, top1_of_teacher = [], [], [], []
            of_list = tokens.of_list(log_softmax(s / T[:, None]))
            for row, indices, log_probs, *rest in of_list:
                log_P, log_Q, _ = _outcomes(row, indices, log_probs, *rest, True)
                log_p.append(log_P)
                log_q.append(log_Q)
                of_rows.append(_listed(row, indices, log_probs))
                used = indices >= 0
                p = np.zeros_like(row)
                np.add.at(p, indices[used], np.exp(log_probs[used]))
                top1_of_teacher.append(np.argmax(p))
            of_rows = np.reshape(of_rows, (-1, 3))
            p_listed, q_listed, overlap = map(mean, of_rows.T)
        entropy = lambda log_x: np.array(
            [-np.sum(_times(np.exp(row), row)) for row in log_x], np.longdouble
        )
        return Metrics(
            mean(D),
            mean(kl),
            cross_entropy,
            mean(entropy(log_q)),
            mean(entropy(log_p)),
            mean(1.0 * (top1 == np.array(top1_of_teacher, int))),
            p_listed,
            q_listed,
            overlap,
            tokens.weights.sum(),
        )


def _listed(log_q, indices, log_probs):
    """The masses of one list in teacher and student, and its share in a top k."""
    used = indices >= 0
    columns = sorted(set(indices[used].tolist()))
    larger = [np.sum(log_q > log_q[column]) for column in columns]
    among = [number < len(columns) for number in larger]
    share = sum(among) / len(columns) if columns else 0.0
    return np.exp(log_probs[used]).sum(), np.exp(log_q[columns]).sum(), share


def _divergence_and_grad(divergence, student_logits, teacher_logits):
    log_p, log_q = log_softmax(teacher_logits), log_softmax(student_logits)
    f, f_p, f_q = divergence(log_p, log_q)
    return np.sum(f, -1), _to_logits(log_q, f_q), _to_logits(log_p, f_p)


def _outcomes(log_q, indices, log_probs, log_rest, eps, tail, lumped=False):
    """The two distributions that a tail compares in one row, and a matrix.

    It sums the columns that make an outcome: `[outcomes, vocab]`, of 0 and 1. Of
    "conditional" it has a listed column in a row, and the student is given these. With
    "renormalize" the unlisted columns are one outcome if they are `lumped`.
    """
    used, p = indices >= 0, np.zeros_like(log_q)
    np.add.at(p, indices[used], np.exp(log_probs[used]))
    listed = np.isin(np.arange(len(log_q)), indices[used])
    if log_rest is None:
        hidden = eps / 2 * np.sum(p - _times(p, np.log(p)))
        rest = max(1 - p.sum(), hidden)
    else:
        rest = np.exp(log_rest)
    columns = np.eye(len(log_q), dtype=log_q.dtype)
    if tail == "uniform":
        p = np.where(listed, p, rest / max((~listed).sum(), 1))
    elif tail != "renormalize" or lumped:
        p, columns = p[listed], columns[listed]
        if tail != "conditional" and not listed.all():
            p = np.append(p, rest if tail == "bucket" else 0)
            columns = np.concatenate([columns, 1 * ~listed[None]])
    if tail != "drop":
        p = p / p.sum()
    log_Q = np.log(columns @ np.exp(log_q))
    if tail == "conditional":
        log_Q = log_softmax(log_q[listed])
    return np.log(p), log_Q, columns


def _listed_divergence_and_grad(divergence, student_logits, of_list):
    losses, grads = np.zeros_like(student_logits[:, 0]), np.zeros_like(student_logits)
    each = getattr(divergence, "divergences", [divergence] * len(of_list))
    for i, (log_q, indices, log_probs, log_rest, eps, tail) in enumerate(of_list):
        log_p, log_Q, columns = _outcomes(
            log_q, indices, log_probs, log_rest, eps, tail
        )
        f, _, f_Q = each[i](log_p, log_Q)
        if tail == "conditional":  # a loss of a smaller vocabulary
            losses[i], grads[i] = f.sum(), _to_logits(log_Q, f_Q) @ columns
            continue
        if tail == "drop":  # not a whole sum, over which the oracle's `q - p` is 0
            f_Q = -np.exp(log_p)
            f = _times(-f_Q, log_p - log_Q)
        q, Q = np.exp(log_q), np.exp(log_Q)
        # ∂ log Q / ∂ log q, where there is any.
        f_q = f_Q @ (columns * q / np.where(Q > 0, Q, 1)[:, None])
        losses[i], grads[i] = f.sum(), f_q - q * f_q.sum()
    return losses, grads


def _to_logits(log_probs, slopes):
    """`slopes - probs Σ slopes`, which is the same for `slopes + c probs`.

    The c is chosen that leaves the likeliest entry no slope. Its gradient may be as
    small as what its probability lacks to 1, and is then a sum over the other entries.
    """
    probs, top = np.exp(log_probs), _at_top(log_probs)
    total = lambda x: np.sum(x, -1, keepdims=True)
    per_prob = total(np.where(top, slopes, 0)) / np.max(probs, -1, keepdims=True)
    slopes = np.where(top, 0 * slopes, slopes - _times(probs, per_prob))
    return slopes - _times(probs, total(slopes))


def _cross_entropy(logits, labels, label_smoothing):
    """The loss and its gradient, both 0 where the label is -100."""
    log_probs, labelled = log_softmax(logits), (labels != -100)[:, None]
    epsilon = np.longdouble(label_smoothing)
    is_label = np.arange(logits.shape[-1]) == labels[:, None]
    # Columns at -inf are as if absent.
    present = logits != -np.inf
    spread = epsilon * present / np.sum(present, -1, keepdims=True)
    target = (1 - epsilon) * is_label + spread
    ce = -np.sum(_times(target, log_probs), -1, keepdims=True)
    # The label's slope is `probs - 1`, and its probability may be nearly 1.
    d_ce = np.where(is_label, np.expm1(log_probs) + epsilon, np.exp(log_probs))
    d_ce = d_ce - spread
    return np.where(labelled, ce, 0)[:, 0], np.where(labelled, d_ce, 0)


class LogProbs(NamedTuple):
    log_probs: Any
    entropy: Any
    student: Any
    temperature: Any


def token_log_probs(
    student, tokens, *, temperature=1.0, where=None, vocab_size=None, cotangents
) -> LogProbs:
    """Log-probabilities of the tokens, `[..., k]`, and entropies, `[...]`.

    With them, their two `cotangents` pulled back to the logits and the temperature.
    """
    rows = _Tokens(student, student, vocab_size, where, None)
    T, listed = rows.per_token(temperature), rows.integer(tokens)
    g, g_entropy = (_real(x)[rows.kept] for x in cotangents)
    log_q = log_softmax(rows.student / T[:, None])
    q, used = np.exp(log_q), listed >= 0
    entropy = -np.sum(_times(q, log_q), -1)
    log_probs = np.take_along_axis(log_q, np.maximum(listed, 0), -1)
    d_z = -g_entropy[:, None] * _times(q, log_q + entropy[:, None])
    for k in range(listed.shape[-1]):
        is_token = np.arange(log_q.shape[-1]) == listed[:, k, None]
        # Of a nearly certain token, `1 - q` is small.
        slope = np.where(is_token, -np.expm1(log_q), -q)
        d_z = d_z + (g * used)[:, k, None] * slope
    d_s = d_z / T[:, None]
    d_T = -np.sum(_times(d_s, rows.student), -1) / T
    all_log_probs = np.zeros(np.shape(tokens), np.longdouble)
    all_log_probs[rows.kept] = np.where(used, log_probs, 0)
    return LogProbs(
        all_log_probs,
        rows.scatter(entropy),
        rows.scatter_rows(d_s, np.shape(student)),
        rows.like(temperature, d_T),
    )


class _Tokens:
    """The tokens that count, as rows: masked tokens and padding are sliced away."""

    def __init__(self, student, teacher, vocab_size, where, weights):
        self.shape = np.shape(student)[:-1]
        self.kept = np.ones(self.shape, bool) if where is None else np.asarray(where)
        self.student = self.rows(student, vocab_size)
        self.list = teacher if hasattr(teacher, "indices") else None
        teacher = teacher if self.list is None else self.list.log_probs
        self.teacher_shape = np.shape(teacher)
        self.teacher = self.rows(teacher, vocab_size if self.list is None else None)
        self.weights = self.per_token(1.0 if weights is None else weights)

    def divergence_and_grad(self, divergence, temperature, teacher_temperature):
        student = self.student / temperature[:, None]
        if self.list is not None:
            of_list = self.of_list(log_softmax(student))
            found = _listed_divergence_and_grad(divergence, student, of_list)
            return *found, np.zeros_like(self.teacher)  # a list is a constant
        teacher = self.teacher / teacher_temperature[:, None]
        return _divergence_and_grad(divergence, student, teacher)

    def of_list(self, log_q):
        """For each token, `log_q` and what there is of its list."""
        eps = float(ml_dtypes.finfo(self.list.log_probs.dtype).eps)
        rest = [None] * len(log_q)
        if self.list.log_rest is not None:
            rest = _real(self.list.log_rest)[self.kept]
        rows = zip(log_q, self.integer(self.list.indices), self.teacher, rest)  # noqa: B905
        return [(*row, eps, self.list.tail) for row in rows]

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
        full[self.kept, : x.shape[-1]] = x
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
