"""The battery: which arrays, dtypes and options are compared.

Three things are left out. float16 numbers so large that PyTorch's intermediate results
overflow: jaxkl computes in float32 and stays finite. At a negative target and a zero
cotangent, how the gradient changes with the cotangent: PyTorch has 0 where the formula,
and jaxkl, have NaN. And optax at zero targets, where it has NaN and jaxkl the limit.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import _data as data


DTYPES = ("float16", "bfloat16", "float32", "float64")
REDUCTIONS = ("none", "sum", "mean", "batchmean")
SIZES = ((1, 8), (16, 256), (4, 32000))
# of input and target
SHAPES = (
    ((), ()),
    ((4,), (4,)),
    ((2, 3, 5), (2, 3, 5)),  # batchmean divides by 2
    ((3,), (2, 3)),  # batchmean divides by 3, the size of the input
    ((2, 3), (3,)),
    ((2, 1), (1, 3)),
    ((), (2, 3)),
    ((2, 3), ()),
    ((0,), (0,)),
    ((0, 3), (0, 3)),
    ((2, 0), (2, 0)),
    ((1, 3), (0, 3)),
)
OPTAX = "kl_divergence", "kl_divergence_with_log_targets", "generalized_kl_divergence"
Numbers = tuple[np.ndarray, ...]  # `input`, `target` and further arguments


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a function in both frameworks."""

    group: str
    name: str
    arguments: tuple  # of `make`
    options: dict[str, Any]  # of the function
    make: Callable[..., Any] = data.rows
    dtypes: tuple[str, ...] = ("float32", "float32")
    kind: str = "gradients"  # see `call_in`
    function: str = "kl_div"
    quantities: tuple[str, ...] = ()  # those that are compared; all if empty
    peer: str = "torch"  # or "optax"

    def numbers(self) -> Numbers:
        """The arguments of the call, as float64 numbers that the dtypes can hold."""
        x, t, *rest = self.make(*self.arguments)
        return (*map(data.rounded, (x, t), self.dtypes), *rest)


def battery(optax: bool = True) -> list[Case]:
    """All cases, with those of optax or without."""
    groups = _by_size, _legacy, _shapes, _dtypes, _special, _second_order, _errors
    return [case for group in (*groups, *[_optax] * optax) for case in group()]


def _case(
    group: str,
    name: str,
    reduction: str,
    log_target: bool,
    *arguments: Any,
    **more: Any,
) -> Case:
    """A case of the gradients of `kl_div`, of `data.rows` unless `more` says else."""
    options = dict(reduction=reduction, log_target=log_target)
    name += ", log_target" * log_target
    return Case(group, name, arguments=arguments, options=options, **more)


def _by_size() -> Iterator[Case]:
    for log, shape, dtype in itertools.product((False, True), SIZES, DTYPES):
        group = "log_target" if log else "reductions"
        for how in REDUCTIONS if shape == SIZES[1] else ("none", "batchmean"):
            name, both = f"{dtype} {shape} {how}", (dtype, dtype)
            yield _case(group, name, how, log, shape, shape, log, dtypes=both)


def _legacy() -> Iterator[Case]:
    reductions = (*REDUCTIONS, "elementwise_mean", "unknown")
    legacy = itertools.product((None, True, False), repeat=2)
    every = itertools.product(("kl_div", "KLDivLoss"), reductions, legacy)
    for function, reduction, booleans in every:
        arguments = (*booleans, reduction)
        name, shapes = f"{function}{arguments}", ((2, 3), (2, 3))
        yield _outcome("legacy arguments", name, arguments, *shapes, function=function)


def _errors() -> Iterator[Case]:
    arguments = (None, None, "sum")
    for dtype in ("int32", "bool", "complex64"):
        for dtypes in ((dtype, "float32"), ("float32", dtype)):
            name, shapes = ", ".join(dtypes), ((3,), (3,))
            yield _outcome("errors", name, arguments, *shapes, dtypes=dtypes)
    for shapes in (((2, 3), (4, 3)), ((2, 3), (2,)), ((0,), (2,))):
        yield _outcome("errors", f"{shapes[0]}, {shapes[1]}", arguments, *shapes)


def _outcome(group: str, name: str, call: tuple, *shapes: Any, **more: Any) -> Case:
    """A case of the warnings, or the error, of a call with these arguments."""
    options = dict(arguments=call)
    return Case(group, name, shapes, options, kind="outcome", **more)


def _shapes() -> Iterator[Case]:
    how = ("none", False), ("mean", False), ("batchmean", False), ("batchmean", True)
    for shapes, (reduction, log) in itertools.product(SHAPES, how):
        name = f"{shapes[0]}, {shapes[1]} {reduction}"
        yield _case("shapes", name, reduction, log, *shapes, log)


def _dtypes() -> Iterator[Case]:
    every = ((2, 3), (2, 3)), ((), (2,)), ((2,), ())
    for dtypes in itertools.product(DTYPES, repeat=2):
        different = len(set(dtypes)) > 1 and "float32" in dtypes
        for shapes in every if different else every[:1]:
            name = ", ".join(f"{d} {s}" for d, s in zip(dtypes, shapes, strict=True))
            yield _case("dtypes", name, "batchmean", False, *shapes, dtypes=dtypes)


def _special() -> Iterator[Case]:
    for dtype, log in itertools.product(DTYPES, (False, True)):
        half = dtype in ("float16", "bfloat16")
        more: dict[str, Any] = dict(make=data.special, dtypes=(dtype, dtype))
        yield _case("special values", dtype, "none", log, half, **more)


def _second_order() -> Iterator[Case]:
    group, shapes = "second order", (((2, 3), (2, 3), "none"), ((2, 3), (1, 3), "mean"))
    for dtype, log in itertools.product(("float32", "float64"), (False, True)):
        more: dict[str, Any] = dict(
            dtypes=(dtype, dtype), kind="second_order", make=data.second_order
        )
        for shape, other, how in shapes:
            rows = functools.partial(data.rows, shape, other, log)
            name = f"{dtype} {shape}, {other} {how}"
            yield _case(group, name, how, log, rows, 1.0, -3.0, **more)
        for c in ((0.0, 1.0), (1.0, 0.0), (1.0, -3.0)):
            name = f"{dtype} special values, cotangents {c}"
            # What is left out is said above.
            more["quantities"] = ("d2_input", "d2_target") if c[1] == 0 else ()
            yield _case(group, name, "none", log, data.special, *c, **more)


def _optax() -> Iterator[Case]:
    masks = [(False, -1), (False, (0, 1)), (True, -1), (True, None)]
    for function, (where, axis) in itertools.product(OPTAX, masks):
        name = f"{function} axis={axis}{', where' * where}"
        arguments = ((4, 3, 6), where, function == OPTAX[1])
        more: dict[str, Any] = dict(make=data.masked, function=function, peer="optax")
        yield Case("optax", name, arguments, dict(axis=axis), **more)
