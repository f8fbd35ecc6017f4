"""The classic mistakes: changes of the right formula, and arrays of the wrong kind."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._torch import check_distributions as distributions
from ._files import Arrays
from ._formula import Formula


USUAL = 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0  # temperatures
Candidates = Iterator[tuple[str, Formula]]  # names of mistakes, and what they lead to
Changes = Iterator[tuple[str, dict[str, Any]]]  # the same, as changed fields


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A mistake, by the name that the report gives it, and what shows it."""

    name: str
    evidence: str


def single_mistakes(right: Formula, arrays: Arrays) -> Candidates:
    """The mistakes that can be made with such arrays."""
    for name, changes in _changes(right, arrays):
        yield name, replace(right, **changes)


def double_mistakes(right: Formula, arrays: Arrays) -> Candidates:
    """Pairs of mistakes that do not change the same part of the formula."""
    every = list(_changes(right, arrays))
    for (name, changes), (other, more) in itertools.combinations(every, 2):
        if not changes.keys() & more.keys():
            yield f"{name}, and {other}", replace(right, **changes, **more)


def at_unknown_temperature(right: Formula, arrays: Arrays) -> Candidates:
    """Logits that were divided by one of the usual temperatures, if none is given."""
    if right.temperature != 1:
        return
    for temperature, t_squared in itertools.product(USUAL, (True, False)):
        formula = replace(right, temperature=temperature, t_squared=t_squared)
        if right.of_models:
            missing = "" if t_squared else "missing T², and "
            yield f"{missing}T = {temperature:g} (give it to be sure)", formula
            continue
        for name, changes in _logits(right, arrays):
            name += f", at T = {temperature:g} (give the temperature to be sure)"
            yield name, replace(formula, **changes)


def _changes(right: Formula, arrays: Arrays) -> Changes:
    mean = right.reduction not in ("none", "sum")
    for other in ("mean", "batchmean", "sum"):
        if right.reduction not in ("none", other):
            meant = right.reduction.replace("rows", "the mean over rows")
            yield f"{other} for {meant}", dict(reduction=other)
    x, t = arrays["input"], arrays["target"]
    whole = right.rows == "all"
    if max(x.ndim, t.ndim) > 2 and right.reduction == "batchmean" and whole:
        name = "mean over all rows for batchmean, which divides by the first axis"
        yield name, dict(reduction="rows")
    if right.temperature != 1:
        yield "missing T²", dict(t_squared=False)
    yield "reversed direction", dict(terms="reverse")
    yield "cross-entropy taken for KL", dict(terms="cross-entropy")
    if not whole:
        if mean:
            yield "mean over padding", dict(rows="count")
        # "batchmean" of all rows divides by the first axis alone.
        reduction = right.reduction.replace("batchmean", "rows")
        yield "padding not masked", dict(rows="all", reduction=reduction)
    if right.of_models:
        if right.temperature != 1:
            yield "logits not divided by T", dict(divided=False)
        return
    if whole and mean and x.ndim == t.ndim > 1 and not np.any(t != 0, -1).all():
        yield "mean over padding", dict(rows="nonzero")
    yield "log_target wrong", dict(log_target=not right.log_target)
    yield "probabilities passed as log-probabilities: input", dict(input="exp")
    yield "the file holds probabilities, their logarithm was taken", dict(input="log")
    if right.log_target:
        name = "probabilities passed as log-probabilities: target"
        yield name, dict(target="exp")
    else:
        name = "log-probabilities passed as probabilities: target"
        yield name, dict(target="log")
    yield from _logits(right, arrays)
    if right.temperature != 1:
        for name, changes in _logits(right, arrays, ", not divided by T"):
            yield name, changes | dict(divided=False)


def _logits(right: Formula, arrays: Arrays, how: str = "") -> Changes:
    softmax = "log_softmax" if right.log_target else "softmax"
    name = f"the file holds logits{how}: input"
    if arrays["input"].ndim:  # a single number has no softmax
        yield name, dict(input="log_softmax")
        if arrays["target"].ndim:
            yield f"{name} and target", dict(input="log_softmax", target=softmax)


def of_contents(arrays: Arrays, log_target: bool, of_models: bool) -> list[Mistake]:
    """What the arrays show without a recording: rows that are no distributions.

    They hold NaN, or logarithms in the place of probabilities, or the reverse, or no
    row sums to 1: these are raw logits, which are right `of_models` alone.
    """
    every = (("input", True), ("target", log_target))
    found = [_of_content(arrays, name, logs, of_models) for name, logs in every]
    return [mistake for mistake in found if mistake]


def _of_content(
    arrays: Arrays, name: str, logs: bool, of_models: bool
) -> Mistake | None:
    nan = np.isnan(arrays[name])
    x = _rows(arrays, name)
    if np.isnan(x).any():
        if "mask" in arrays and arrays["mask"].shape == nan.shape[:-1]:
            nan &= arrays["mask"].astype(bool)[..., None]
        evidence = (
            f"{nan.sum():,} of {nan.size:,} numbers of `{name}` "
            f"{'is' if nan.sum() == 1 else 'are'} NaN, the first at "
            f"{np.argwhere(nan)[0].tolist()}"
        )
        return Mistake(f"NaN in {name}", evidence)
    if of_models or not x.ndim or not x.size or _holds(x, logs):
        return None
    exponentials = "the exponentials of "
    if _holds(x, not logs):
        kinds = "probabilities", "log-probabilities"
        wrong = "log_target wrong: " if name == "target" else ""
        evidence = f"every row of `{name}` sums to 1: it holds {kinds[not logs]}"
        if not logs:
            evidence = exponentials + evidence.replace("sums", "sum")
        text = f"{wrong}{kinds[not logs]} passed as {kinds[logs]}: {name}"
        return Mistake(text, evidence)
    tol = distributions.TOLERANCE[x.dtype.name]
    with np.errstate(over="ignore"):
        x = x.astype(np.float64)
        sums = np.sum(np.exp(x) if logs else x, -1)
    if np.any(np.isnan(sums) | (np.abs(sums - 1) <= tol)):
        return None
    evidence = (
        f"{exponentials * logs}no row of `{name}` sum{'' if logs else 's'} to 1 (the "
        f"first: {sums.flat[0]:.6g}): kl_div takes {'log_' * logs}softmax({name})"
    )
    kind = "log-probabilities" if logs else "probabilities"
    return Mistake(f"raw logits passed as {kind}: {name}", evidence)


def _rows(arrays: Arrays, name: str) -> np.ndarray:
    """The rows that count, without rows of zeros, which are padding."""
    x = arrays[name]
    if x.dtype == np.float64:  # the numbers may have been float32 before
        x = x.astype(np.float32)
    if x.ndim < 2:
        return x
    kept = np.any(x != 0, -1)
    if "mask" in arrays and arrays["mask"].shape == kept.shape:
        kept &= arrays["mask"].astype(bool)
    return x[kept]


def _holds(x: np.ndarray, logs: bool) -> bool:
    try:
        distributions.check_rows("input", jnp.asarray(x), logs)
    except ValueError:
        return False
    return True
