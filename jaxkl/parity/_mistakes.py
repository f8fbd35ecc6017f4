"""The classic mistakes: changes of the right formula, and arrays of the wrong kind."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from .._torch import check_distributions as distributions
from ._files import Arrays


USUAL = 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0  # temperatures

# How an array is changed before it is used. Logits are divided by T first.
CHANGES: dict[str, Callable[..., jax.Array]] = {
    "": lambda x: x,
    "log": jnp.log,
    "exp": jnp.exp,
    "log_softmax": jax.nn.log_softmax,
    "softmax": jax.nn.softmax,
}


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A mistake, by the name that the report gives it, and what shows it."""

    name: str
    evidence: str


@dataclasses.dataclass(frozen=True)
class Formula:
    """`kl_div(input, target)` over the rows that count, times T²: right or mistaken."""

    reduction: str
    log_target: bool
    temperature: float = 1.0
    t_squared: bool = True
    input: str = ""  # a key of `CHANGES`
    target: str = ""
    divided: bool = True  # whether logits are divided by T
    reverse: bool = False
    cross_entropy: bool = False
    masked: bool = False
    # Where padding counts: "none", in the "count" of rows only, or "all": the sum too.
    padding: str = "none"
    # Whether the arrays are logits of a student and a teacher, in this order.
    of_models: bool = False

    def __call__(
        self, x: jax.Array, t: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The loss, and the sum of its terms' magnitudes, which bounds its rounding."""
        x, t = self._changed(self.input, x), self._changed(self.target, t)
        first, second = self._terms(x, t)
        first, second = jnp.broadcast_arrays(first, second)
        if mask is not None and self.padding != "all":
            counted = mask.reshape(mask.shape + (1,) * (first.ndim - mask.ndim))
            first, second = (jnp.where(counted, a, 0) for a in (first, second))
        sizes = jnp.abs(first) + jnp.abs(second)
        factor: Any = self.temperature**2 if self.t_squared else 1.0
        if self.reduction != "none":
            factor /= self._divisor(x, first.shape, mask)
            return factor * jnp.sum(first + second), factor * jnp.sum(sizes)
        return factor * (first + second), factor * sizes

    def _changed(self, change: str, x: jax.Array) -> jax.Array:
        return CHANGES[change](x / self.temperature if self._divides(change) else x)

    def _divides(self, change: str) -> bool:
        return "softmax" in change and self.divided and self.temperature != 1

    def _terms(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.reverse:
            log_t = t if self.log_target else jnp.log(t)
            return jnp.exp(x) * x, -jnp.exp(x) * log_t
        p = jnp.exp(t) if self.log_target else t
        if self.cross_entropy:
            return -p * x, jnp.zeros_like(p * x)
        return (p * t if self.log_target else xlogy(p, p)), -p * x

    def _divisor(
        self, x: jax.Array, shape: tuple[int, ...], mask: jax.Array | None
    ) -> jax.Array | int:
        if self.reduction == "sum":
            return 1
        width = shape[-1] if shape else 1
        rows = math.prod(shape[:-1]) or 1
        if mask is not None and self.padding == "none":
            rows = jnp.sum(jnp.broadcast_to(mask, shape[:-1]), dtype=x.dtype)
        elif self.reduction == "batchmean" and mask is None:
            return x.shape[0] if x.ndim else 1
        return rows * width if self.reduction == "mean" else rows

    def __str__(self) -> str:
        x, t = self._shown(self.input, "input"), self._shown(self.target, "target")
        options = f'reduction="{self.reduction}"'
        if self.reverse:
            log_t = t if self.log_target else f"log({t})"
            text = f"kl_div({log_t}, exp({x}), {options})"
        elif self.cross_entropy:
            p = f"exp({t})" if self.log_target else t
            text = f"-({p} * {x}), {options}"
        else:
            text = f"kl_div({x}, {t}, {options}{', log_target=True' * self.log_target})"
        if self.reduction == "rows":
            text = text.replace('reduction="rows"', 'reduction="sum"') + " / rows"
        if self.t_squared and self.temperature != 1:
            text += f" * {self.temperature:g}**2"
        rows = {
            "none": ", rows of mask" * self.masked,
            "count": ", rows of mask, divided by all",
            "all": ", all rows",
        }
        text += rows[self.padding]
        return as_models(text) if self.of_models else text

    def _shown(self, change: str, name: str) -> str:
        if self._divides(change):
            name += f" / {self.temperature:g}"
        return f"{change}({name})" if change else name


def as_models(text: str) -> str:
    """The text with the names of models for those of `kl_div`'s arguments."""
    return re.sub(r"(?<!log_)target", "teacher", text.replace("input", "student"))


Candidates = Iterator[tuple[str, Formula]]  # names of mistakes, and what they lead to
Changes = Iterator[tuple[str, dict[str, Any]]]  # the same, as changed fields
Dims = tuple[int, int]  # of input and target


def single_mistakes(right: Formula, dims: Dims) -> Candidates:
    """The mistakes that can be made with arrays of so many dimensions."""
    for name, changes in _changes(right, dims):
        yield name, replace(right, **changes)


def double_mistakes(right: Formula, dims: Dims) -> Candidates:
    """Pairs of mistakes that do not change the same part of the formula."""
    every = list(_changes(right, dims))
    for (name, changes), (other, more) in itertools.combinations(every, 2):
        if not changes.keys() & more.keys():
            yield f"{name}, and {other}", replace(right, **changes, **more)


def at_unknown_temperature(right: Formula, dims: Dims) -> Candidates:
    """Logits that were divided by one of the usual temperatures, if none is given."""
    if right.temperature != 1:
        return
    for temperature, t_squared in itertools.product(USUAL, (True, False)):
        formula = replace(right, temperature=temperature, t_squared=t_squared)
        if right.of_models:
            missing = "" if t_squared else "missing T², and "
            yield f"{missing}T = {temperature:g} (give it to be sure)", formula
            continue
        for name, changes in _logits(right, dims):
            name += f", at T = {temperature:g} (give the temperature to be sure)"
            yield name, replace(formula, **changes)


def _changes(right: Formula, dims: Dims) -> Changes:
    for other in ("mean", "batchmean", "sum"):
        if right.reduction not in ("none", other):
            meant = right.reduction.replace("rows", "the mean over rows")
            yield f"{other} for {meant}", dict(reduction=other)
    if max(dims) > 2 and right.reduction == "batchmean" and not right.masked:
        name = "mean over all rows for batchmean, which divides by the first axis"
        yield name, dict(reduction="rows")
    if right.temperature != 1:
        yield "missing T²", dict(t_squared=False)
    yield "reversed direction", dict(reverse=True)
    yield "cross-entropy taken for KL", dict(cross_entropy=True)
    if right.masked:
        if right.reduction in ("mean", "batchmean", "rows"):
            yield "mean over padding", dict(padding="count")
        yield "padding not masked", dict(padding="all")
    if right.of_models:
        if right.temperature != 1:
            yield "logits not divided by T", dict(divided=False)
        return
    yield "log_target wrong", dict(log_target=not right.log_target)
    yield "probabilities passed as log-probabilities: input", dict(input="exp")
    yield "the file holds probabilities, their logarithm was taken", dict(input="log")
    if right.log_target:
        name = "probabilities passed as log-probabilities: target"
        yield name, dict(target="exp")
    else:
        name = "log-probabilities passed as probabilities: target"
        yield name, dict(target="log")
    yield from _logits(right, dims)
    if right.temperature != 1:
        for name, changes in _logits(right, dims, ", not divided by T"):
            yield name, changes | dict(divided=False)


def _logits(right: Formula, dims: Dims, how: str = "") -> Changes:
    softmax = "log_softmax" if right.log_target else "softmax"
    name = f"the file holds logits{how}: input"
    if dims[0]:  # a single number has no softmax
        yield name, dict(input="log_softmax")
    if all(dims):
        yield f"{name} and target", dict(input="log_softmax", target=softmax)


def nans(arrays: Arrays) -> list[Mistake]:
    """Arrays with NaN in rows that count."""
    found = []
    for name in ("input", "target"):
        x = arrays[name]
        where = np.isnan(x)
        if "mask" in arrays and arrays["mask"].shape == x.shape[:-1]:
            where &= arrays["mask"].astype(bool)[..., None]
        if where.any():
            first = np.argwhere(where)[0].tolist()
            evidence = (
                f"{where.sum():,} of {x.size:,} numbers of `{name}` "
                f"{'is' if where.sum() == 1 else 'are'} NaN, the first at {first}"
            )
            found.append(Mistake(f"NaN in {name}", evidence))
    return found


def wrong_contents(arrays: Arrays, log_target: bool) -> list[Mistake]:
    """Arrays that hold logarithms in the place of probabilities, or the reverse."""
    found = []
    for name, logs in (("input", True), ("target", log_target)):
        x = _rows(arrays, name)
        if x.ndim and x.size and not _holds(x, logs) and _holds(x, not logs):
            kinds = "probabilities", "log-probabilities"
            text = f"{kinds[not logs]} passed as {kinds[logs]}: {name}"
            wrong = "log_target wrong: " if name == "target" else ""
            found.append(Mistake(wrong + text, _evidence(name, x, logs)))
    return found


def no_distributions(arrays: Arrays, log_target: bool) -> list[Mistake]:
    """Arrays of which no row is a distribution: most likely raw logits."""
    found = []
    for name, logs in (("input", True), ("target", log_target)):
        x = _rows(arrays, name)
        if not (x.ndim and x.size) or _holds(x, logs) or _holds(x, not logs):
            continue
        tol = distributions.TOLERANCE[x.dtype.name]
        with np.errstate(over="ignore"):
            x = x.astype(np.float64)
            sums = np.sum(np.exp(x) if logs else x, -1)
        if np.any(np.isnan(sums) | (np.abs(sums - 1) <= tol)):
            continue
        what, log = ("the exponentials of no row", "log_") if logs else ("no row", "")
        evidence = (
            f"{what} of `{name}` sum to 1 (the first: {sums.flat[0]:.6g}): kl_div "
            f"takes {log}softmax({name})"
        )
        kind = "log-probabilities" if logs else "probabilities"
        found.append(Mistake(f"raw logits passed as {kind}: {name}", evidence))
    return found


def _evidence(name: str, x: np.ndarray, logs: bool) -> str:
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
