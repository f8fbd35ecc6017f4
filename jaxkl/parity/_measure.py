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

from ._cases import Case, Numbers, OPTAX


# The ulp allowed for a few functions and products, each of them right to about one.
ELEMENTWISE = 4.0

# How large the terms of each number are, and how many are added up.
Scale = tuple[np.ndarray, int]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference between a result and what was expected."""

    problem: str = ""  # what does not agree; empty if everything does
    numbers: int = 0  # how many were compared
    ulp: float = 0.0
    relative: float = 0.0
    index: tuple[int, ...] | None = None
    actual: float | None = None


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
    dtype, size = jnp.finfo(actual.dtype), actual.size
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    special = ~np.isfinite(expected)
    same = np.where(special, equal(actual, expected), np.isfinite(actual))
    if not same.all():
        index = _argmax(~same)
        problem = f"{actual[index]} where {expected[index]} is expected"
        return Difference(problem, size, index=index, actual=float(actual[index]))
    if special.all():
        return Difference("", size)
    with np.errstate(all="ignore"):
        exact = np.where(np.isfinite(exact), exact, expected)
        scale = np.where(np.isfinite(scale), np.maximum(scale, np.abs(exact)), 0)
        scale = np.where(special, 1, np.maximum(scale, float(dtype.tiny)))
        error = np.where(special, 0, np.abs(actual - exact))
    # The distance between two neighbours of the dtype at numbers of that size.
    ulp = error / (np.exp2(np.floor(np.log2(scale))) * float(dtype.eps))
    index = _argmax(ulp)
    # The rounding errors of a sum of `count` numbers add up as a random walk.
    allowed = ELEMENTWISE + (math.sqrt(count) if count > 1 else 0.0)
    worst, relative = float(ulp[index]), float(np.max(error / scale))
    problem = "" if worst <= allowed else f"{worst:.3g} ulp, {allowed:.3g} allowed"
    return Difference(problem, size, worst, relative, index, float(actual[index]))


def equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which numbers are equal; here NaN equals NaN."""
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _argmax(x: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(np.argmax(x), x.shape)))


@np.errstate(all="ignore")
def scales(
    case: Case, numbers: Numbers, results: dict[str, np.ndarray]
) -> dict[str, Scale]:
    """For each of the float64 `results`: how large its terms are, and how many."""
    if case.function == "distillation_loss":
        return _scales_of_distillation(case, numbers)
    x, t = np.broadcast_arrays(*numbers[:2])
    # The sizes of the terms of the value, of its two gradients, and of theirs.
    if case.options.get("log_target") or case.function == OPTAX[1]:
        p = d_input = mixed = np.exp(t)
        size, unit = np.abs(t) + np.abs(x), p
        pure = p * (size + 2)
    else:
        p = d_input = np.abs(t)
        size = np.abs(np.log(np.where(t > 0, t, 1.0))) + np.abs(x)
        unit = mixed = np.ones_like(t)
        pure = 1 / p
    value, d_target = p * size, unit * (size + 1)
    if case.function == OPTAX[2]:
        value, d_input = value + np.exp(x) + t, d_input + np.exp(x)
    if case.kind == "outcome":  # A bound: "mean" and "batchmean" divide.
        return {k: _sum_to(v.shape, value) for k, v in results.items()}
    if case.peer == "optax":
        total, g = np.sum(value, case.options["axis"]), np.max(np.abs(numbers[2]))
        found = {"d_input": (g * d_input, 1), "d_target": (g * d_target, 1)}
        return found | {"value": (total, value.size // total.size)}

    reduction = case.options["reduction"]
    divisor = {
        "mean": value.size,
        "batchmean": numbers[0].shape[0] if numbers[0].ndim else 1,
    }.get(reduction, 1)
    shape = value.shape if reduction == "none" else ()
    g = np.abs(np.resize(numbers[2], shape)) / divisor
    terms = {"value": value / divisor, "d_input": g * d_input, "d_target": g * d_target}
    if case.kind == "second_order":
        c_x, c_t = (np.abs(c) for c in numbers[3:])
        terms = {
            "d2_input": g * c_t * mixed,
            "d2_target": g * (c_x * mixed + c_t * pure),
            "d2_g": (c_x * d_input + c_t * d_target) / divisor,
        }
    shapes = {"input": numbers[0].shape, "target": numbers[1].shape}
    return {
        name: _sum_to(
            shapes.get(name.rpartition("_")[2], shape),
            np.broadcast_to(every, value.shape),
        )
        for name, every in terms.items()
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
    slope, width = T * (p + q) * size / divisor, value.shape[-1]
    return {
        "value": (np.sum(value) / divisor, value.size),
        "d_input": (slope, width),
        "d_target": (slope * size, width),
    }


def _sum_to(shape: tuple[int, ...], terms: np.ndarray) -> Scale:
    """The transpose of broadcasting `shape`, and the number of terms in each sum."""
    count = max(terms.size // max(math.prod(shape), 1), 1)
    terms = np.sum(terms, axis=tuple(range(terms.ndim - len(shape))))
    kept = tuple(i for i, n in enumerate(shape) if n == 1 != terms.shape[i])
    return np.sum(terms, axis=kept, keepdims=True), count
