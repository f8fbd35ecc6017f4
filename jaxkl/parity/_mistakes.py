"""The classic mistakes, each as a change of the right formula."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from ._formula import Formula


USUAL = 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0  # temperatures


def single_mistakes(right: Formula, dims: int) -> Iterator[tuple[str, Formula]]:
    """Names, and the formulas that they lead to, for arrays of so many dimensions."""
    for name, changes in _changes(right, dims):
        yield name, replace(right, **changes)


def double_mistakes(right: Formula, dims: int) -> Iterator[tuple[str, Formula]]:
    every = list(_changes(right, dims))
    for (name, changes), (other, more) in itertools.combinations(every, 2):
        if not changes.keys() & more.keys():
            yield f"{name}, and {other}", replace(right, **changes, **more)


def at_unknown_temperature(right: Formula) -> Iterator[tuple[str, Formula]]:
    """Logits, divided by one of the usual temperatures."""
    for temperature, t_squared in itertools.product(USUAL, (True, False)):
        formula = replace(right, temperature=temperature, t_squared=t_squared)
        for name, changes in _logits(right):
            name += f", at T = {temperature:g} (give the temperature to be sure)"
            yield name, replace(formula, **changes)


def _changes(right, dims):
    for other in ("mean", "batchmean", "sum"):
        if right.reduction not in ("none", other):
            yield f"{other} for {right.reduction}", dict(reduction=other)
    if dims > 2 and right.reduction == "batchmean" and not right.masked:
        name = "mean over all rows for batchmean, which divides by the first axis"
        yield name, dict(reduction="rows")
    if right.temperature != 1:
        yield "missing T²", dict(t_squared=False)
    yield "log_target wrong", dict(log_target=not right.log_target)
    yield "probabilities passed as log-probabilities: input", dict(input="exp")
    yield "the file holds probabilities, their logarithm was taken", dict(input="log")
    if right.log_target:
        name = "probabilities passed as log-probabilities: target"
        yield name, dict(target="exp")
    else:
        name = "log-probabilities passed as probabilities: target"
        yield name, dict(target="log")
    yield "reversed direction", dict(reverse=True)
    yield "cross-entropy taken for KL", dict(cross_entropy=True)
    if right.masked:
        if right.reduction in ("mean", "batchmean"):
            yield "mean over padding", dict(padding="count")
        yield "padding not masked", dict(padding="all")
    yield from _logits(right)
    if right.temperature != 1:
        for name, changes in _logits(right, ", not divided by T"):
            yield name, changes | dict(divided=False)


def _logits(right, how=""):
    softmax = "log_softmax" if right.log_target else "softmax"
    name = f"the file holds logits{how}: input"
    yield name, dict(input="log_softmax")
    yield f"{name} and target", dict(input="log_softmax", target=softmax)
