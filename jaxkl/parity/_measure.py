"""When two results agree, and how far apart they are.

The dtype, the shape and every NaN and infinity must be those of PyTorch in the same
dtype. A finite number is compared with PyTorch in float64 on the same numbers, so that
neither framework's rounding is taken for the truth. One ulp is the unit in the last
place of the result's dtype, at the size of the largest terms that were added up.
Rounding errors grow with the terms, not with their sum: `t log t - t x` may cancel, in
PyTorch as here.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from ._cases import Case, Numbers


# The ulp allowed for a few functions and products, each of them right to about one.
ELEMENTWISE = 4.0

# How large the terms of each number are, and how many are added up.
Scale = tuple[np.ndarray, int]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference between `actual` and what was expected."""

    problem: str = ""  # what does not agree; empty if everything does
    numbers: int = 0  # how many were compared
    ulp: float = 0.0
    relative: float = 0.0
    peer_ulp: float = 0.0  # the peer's own error: in the dtype, against float64
    allowed: float = 0.0
    index: tuple[int, ...] | None = None
    actual: float | None = None
    expected: float | None = None


def difference(
    actual: np.ndarray,
    expected: np.ndarray,
    exact: np.ndarray,
    scale: np.ndarray,
    count: int,
) -> Difference:
    """Compares two arrays, given the peer's result and the size of terms in float64."""
    for what in ("dtype", "shape"):
        ours, theirs = (str(getattr(x, what)) for x in (actual, expected))
        if ours != theirs:
            return Difference(f"{what} {ours}, expected {theirs}", actual.size)
    dtype, size = actual.dtype, actual.size
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    special = ~np.isfinite(expected)
    same = np.where(special, equal(actual, expected), np.isfinite(actual))
    if not same.all():
        index = _argmax(~same)
        return Difference(
            f"{actual[index]} where {expected[index]} is expected",
            size,
            index=index,
            actual=float(actual[index]),
            expected=float(expected[index]),
        )
    if special.all():
        return Difference("", size)
    with np.errstate(all="ignore"):
        exact = np.where(np.isfinite(exact), exact, expected)
        scale = np.where(np.isfinite(scale), np.maximum(scale, np.abs(exact)), 0)
        scale = np.maximum(scale, float(jnp.finfo(dtype).tiny))
        unit = _ulp(np.where(special, 1, scale), dtype)
        error, peer = (
            np.where(special, 0, np.abs(x - exact)) for x in (actual, expected)
        )
        relative = np.where(special, 0, error / scale)
    index = _argmax(error / unit)
    worst, allowed = float((error / unit)[index]), _allowed_ulp(count)
    return Difference(
        "" if worst <= allowed else f"{worst:.3g} ulp, {allowed:.3g} allowed",
        size,
        worst,
        float(np.max(relative)),
        float(np.max(peer / unit)),
        allowed,
        index,
        float(actual[index]),
        float(exact[index]),
    )


def equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which numbers are equal; here NaN equals NaN."""
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _argmax(x: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(np.argmax(x), x.shape)))


def _ulp(size: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The distance between two neighbours of `dtype` at numbers of that size."""
    return np.exp2(np.floor(np.log2(size))) * float(jnp.finfo(dtype).eps)


def _allowed_ulp(count: int) -> float:
    """The rounding errors of a sum of `count` numbers add up as a random walk."""
    return ELEMENTWISE + (math.sqrt(count) if count > 1 else 0.0)


def scales(
    case: Case, numbers: Numbers, results: dict[str, np.ndarray]
) -> dict[str, Scale]:
    """For each of the float64 `results`: how large its terms are, and how many."""
    with np.errstate(all="ignore"):
        if case.function == "losses":
            return _scales_of_losses(case.options["name"], numbers, results)
        if case.function == "distillation":
            return _scales_of_distillation(case, numbers)
        return _scales_of_kl_div(case, numbers, results)


def _scales_of_kl_div(
    case: Case, numbers: Numbers, results: dict[str, np.ndarray]
) -> dict[str, Scale]:
    log_target = case.options.get("log_target", False)
    x, t = np.broadcast_arrays(*numbers[:2])
    value = _value(x, t, log_target)
    if case.function == "call":
        # This is a bound: the other reductions divide.
        sums = results["value"].ndim == 0
        return {"value": _total(value) if sums else (value, 1)}

    reduction = case.options["reduction"]
    divisor = {
        "mean": value.size,
        "batchmean": numbers[0].shape[0] if numbers[0].ndim else 1,
    }.get(reduction, 1)
    shape = value.shape if reduction == "none" else ()
    g = np.abs(np.resize(numbers[2], shape)) / divisor
    to_input, to_target = (n.shape for n in numbers[:2])

    def summed(shape: tuple[int, ...], terms: np.ndarray) -> Scale:
        return _sum_to(shape, np.broadcast_to(terms, value.shape))

    d_input, d_target = _gradients(x, t, log_target)
    if case.function == "gradients":
        return {
            "value": summed(shape, value / divisor),
            "d_input": summed(to_input, g * d_input),
            "d_target": summed(to_target, g * d_target),
        }
    c_x, c_t = (np.abs(c) for c in numbers[3:])
    mixed, pure = _second(x, t, log_target)
    return {
        "d2_input": summed(to_input, g * c_t * mixed),
        "d2_target": summed(to_target, g * (c_x * mixed + c_t * pure)),
        "d2_g": summed(shape, (c_x * d_input + c_t * d_target) / divisor),
    }


def _scales_of_distillation(case: Case, numbers: Numbers) -> dict[str, Scale]:
    """Dividing by T rounds the logits, so all terms grow with these."""
    T = case.options["temperature"]
    x = np.stack([n / T for n in numbers[:2]])
    size = 1 + np.sum(np.max(np.abs(np.where(np.isfinite(x), x, 0)), -1), 0)[..., None]
    q, p = np.exp(x - np.logaddexp.reduce(x, -1, keepdims=True))
    value = T**2 * p * size
    rows = numbers[3].sum() if len(numbers) > 3 else value[..., 0].size
    divisor = rows if case.options["reduction"] == "mean" else 1
    total, count = _total(value)
    slope = T * (p + q) * size / divisor
    width = value.shape[-1]
    return {
        "value": (total / divisor, count),
        "d_input": (slope, width),
        "d_target": (slope * size, width),
    }


def _scales_of_losses(
    name: str, numbers: Numbers, results: dict[str, np.ndarray]
) -> dict[str, Scale]:
    x, t = numbers[:2]
    log_target = name == "kl_divergence_with_log_targets"
    value, (d_input, d_target) = _value(x, t, log_target), _gradients(x, t, log_target)
    if name == "generalized_kl_divergence":
        value, d_input = value + np.exp(x) + t, d_input + np.exp(x)
    g = np.max(np.abs(numbers[2]))
    shape = results["value"].shape
    terms, count = _total(value) if shape == () else (np.sum(value, -1), x.shape[-1])
    return {
        "value": (np.resize(np.max(terms, initial=0), shape), count),
        "d_input": (g * d_input, 1),
        "d_target": (g * d_target, 1),
    }


def _value(x: np.ndarray, t: np.ndarray, log_target: bool) -> np.ndarray:
    if log_target:
        return np.exp(t) * (np.abs(t) + np.abs(x))
    return np.abs(t) * (_log(t) + np.abs(x))


def _gradients(
    x: np.ndarray, t: np.ndarray, log_target: bool
) -> tuple[np.ndarray, np.ndarray]:
    if log_target:
        return np.exp(t), np.exp(t) * (np.abs(t) + np.abs(x) + 1)
    return np.abs(t), _log(t) + np.abs(x) + 1


def _second(
    x: np.ndarray, t: np.ndarray, log_target: bool
) -> tuple[np.ndarray, np.ndarray]:
    if log_target:
        return np.exp(t), np.exp(t) * (np.abs(t) + np.abs(x) + 2)
    return np.ones_like(t), 1 / np.abs(t)


def _log(t: np.ndarray) -> np.ndarray:
    return np.abs(np.log(np.where(t > 0, t, 1.0)))


def _total(terms: np.ndarray) -> Scale:
    return np.sum(terms), max(terms.size, 1)


def _sum_to(shape: tuple[int, ...], terms: np.ndarray) -> Scale:
    """The transpose of broadcasting `shape`, and the number of terms in each sum."""
    count = max(terms.size // max(int(np.prod(shape)), 1), 1)
    extra = tuple(range(terms.ndim - len(shape)))
    terms = np.sum(terms, axis=extra)
    kept = tuple(i for i, n in enumerate(shape) if n == 1 != terms.shape[i])
    return np.sum(terms, axis=kept, keepdims=True), count
