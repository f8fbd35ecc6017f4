"""When two results agree, and how far apart they are.

The dtype, the shape and every NaN and infinity must be those of PyTorch in the same
dtype. A finite number is compared with PyTorch in float64 on the same numbers, so that
neither framework's rounding is taken for the truth. One ulp is the unit in the last
place of the result's dtype, at the size of the largest terms that were added up.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


# A few elementary functions and products, each right to about one ulp.
ELEMENTWISE = 4.0


def allowed_ulp(count: int) -> float:
    """For a sum of `count` numbers: its rounding errors add up as a random walk."""
    return ELEMENTWISE + (math.sqrt(count) if count > 1 else 0.0)


def ulp(size, dtype):
    """Distance between two neighbours of `dtype` at numbers of that size."""
    return np.exp2(np.floor(np.log2(size))) * float(jnp.finfo(dtype).eps)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between `actual` and what was expected, at its worst."""

    problem: str = ""  # what does not agree; empty if all does
    numbers: int = 0  # how many were compared
    ulp: float = 0.0
    relative: float = 0.0
    peer_ulp: float = 0.0  # the same of PyTorch in the dtype, beside float64
    allowed: float = 0.0
    index: tuple[int, ...] | None = None
    actual: float | None = None
    expected: float | None = None


def difference(actual, expected, exact, scale, count) -> Difference:
    """Of arrays; `exact` and `scale` are float64."""
    for what in ("dtype", "shape"):
        ours, theirs = (str(getattr(x, what)) for x in (actual, expected))
        if ours != theirs:
            return Difference(f"{what} {ours}, expected {theirs}", actual.size)
    dtype, size = actual.dtype, actual.size
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    special = ~np.isfinite(expected)
    same = np.where(
        special, (actual == expected) | (np.isnan(actual) & np.isnan(expected)), True
    ) & (special | np.isfinite(actual))
    if not same.all():
        index = _first(~same)
        return Difference(
            f"{actual[index]} where {expected[index]} is expected",
            size,
            index=index,
            actual=float(actual[index]),
            expected=float(expected[index]),
        )
    with np.errstate(all="ignore"):
        exact = np.where(np.isfinite(exact), exact, expected)
        scale = np.where(np.isfinite(scale), np.maximum(scale, np.abs(exact)), 0)
        scale = np.maximum(scale, float(jnp.finfo(dtype).tiny))
        unit = ulp(np.where(special, 1, scale), dtype)
        error, peer = (
            np.where(special, 0, np.abs(x - exact)) for x in (actual, expected)
        )
        relative = np.where(special, 0, error / scale)
    if size == 0 or special.all():
        return Difference("", size)
    index = np.unravel_index(np.argmax(error / unit), error.shape)
    index = tuple(map(int, index))
    worst, allowed = float((error / unit)[index]), allowed_ulp(count)
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


def _first(bad) -> tuple[int, ...]:
    return tuple(map(int, np.argwhere(bad)[0]))


def plain(x):
    """JSON has no NaN and no infinity: their names instead."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    return x if not isinstance(x, float) or math.isfinite(x) else str(x)
