"""What arrays show by themselves: logarithms, probabilities, or NaN."""

import jax.numpy as jnp
import numpy as np

from .. import _check_distributions as distributions


def wrong_contents(arrays, log_target) -> list[tuple[str, str]]:
    """Arrays that hold logarithms in the place of probabilities, or the reverse."""
    found = []
    for name, logs in (("input", True), ("target", log_target)):
        x = _rows(arrays, name)
        if x.ndim and x.size and not _holds(x, logs) and _holds(x, not logs):
            found.append((_name(name, logs), _evidence(name, x, logs)))
    return found


def nans(arrays) -> list[tuple[str, str]]:
    """Arrays with NaN where it counts."""
    found = []
    for name in ("input", "target"):
        x = arrays[name]
        where = np.isnan(x) & _counts(arrays, x)
        if where.any():
            first = np.argwhere(where)[0].tolist()
            evidence = (
                f"{where.sum():,} of {x.size:,} numbers of `{name}` "
                f"{'is' if where.sum() == 1 else 'are'} NaN, the first at {first}"
            )
            found.append((f"NaN in {name}", evidence))
    return found


def _counts(arrays, x):
    if "mask" not in arrays or arrays["mask"].shape != x.shape[:-1]:
        return True
    return arrays["mask"].astype(bool)[..., None]


def _name(name, logs):
    kinds = "probabilities", "log-probabilities"
    text = f"{kinds[not logs]} passed as {kinds[logs]}: {name}"
    return f"log_target wrong: {text}" if name == "target" else text


def _evidence(name, x, logs):
    x = x.astype(np.float64)
    entries, exponentials = (float(np.sum(a, -1).flat[0]) for a in (x, np.exp(x)))
    if logs:
        return (
            f"every row of `{name}` sums to 1 (the first to {entries:.6g}) and the "
            f"exponentials of the first to {exponentials:.6g}: it holds probabilities"
        )
    return (
        f"the exponentials of every row of `{name}` sum to 1 (the first to "
        f"{exponentials:.6g}): it holds log-probabilities"
    )


def _rows(arrays, name):
    """The rows that count, without padding of zeros."""
    x = arrays[name]
    if x.dtype == np.float64:  # often of numbers that were float32
        x = x.astype(np.float32)
    if x.ndim < 2:
        return x
    kept = np.any(x != 0, -1)
    if "mask" in arrays and arrays["mask"].shape == kept.shape:
        kept &= arrays["mask"].astype(bool)
    return x[kept]


def _holds(x, logs):
    try:
        distributions.check_rows("input", jnp.asarray(x), logs)
    except ValueError:
        return False
    return True
