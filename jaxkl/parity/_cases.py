"""The battery: which arrays, dtypes and options are compared."""

import dataclasses
import importlib
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
LEGACY = tuple(itertools.product((None, True, False), repeat=2))
OPTAX = "kl_divergence", "kl_divergence_with_log_targets", "generalized_kl_divergence"
PEERS = {"PyTorch": "torch", "optax": "optax"}
Numbers = tuple[np.ndarray, ...]  # `input`, `target` and further arguments

NOT_COMPARED = (
    "float16 numbers so large that PyTorch's intermediate results overflow: jaxkl "
    "computes in float32 and stays finite",
    "at a negative target and zero cotangent, how the gradient changes with the "
    "cotangent: PyTorch has 0 where the formula, and jaxkl, have NaN",
    "optax at zero targets, where it has NaN and jaxkl.losses the limit",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a function in both frameworks."""

    group: str
    name: str
    function: str  # "gradients" is `jax_gradients` and `torch_gradients`
    make: Callable[..., Any]  # a function of `_data`, which makes the numbers
    arguments: tuple
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32", "float32")
    quantities: tuple[str, ...] = ()  # those that are compared; all if empty
    peer: str = "PyTorch"  # a key of `PEERS`

    def numbers(self) -> Numbers:
        """The arguments of the call, as float64 numbers that the dtypes can hold."""
        x, t, *rest = self.make(*self.arguments)
        return (*map(data.rounded, (x, t), self.dtypes), *rest)

    def function_in(self, framework: str) -> Callable[..., dict[str, Any]]:
        """The function of `_in_jax`, `_in_torch` or `_in_optax` that makes the call."""
        # Imported only now: PyTorch and optax are slow to import, and optional.
        module = importlib.import_module(f"{__package__}._in_{framework}")
        return getattr(module, f"{framework}_{self.function}")


def battery(optax: bool = True) -> list[Case]:
    """All cases, with those of optax or without."""
    cases = [
        *_by_size(),
        *_legacy(),
        *_shapes(),
        *_dtypes(),
        *_special(),
        *_second_order(),
        *_errors(),
    ]
    return cases + list(_optax() if optax else [])


def _by_size() -> Iterator[Case]:
    for log_target, shape, dtype in itertools.product((False, True), SIZES, DTYPES):
        for reduction in REDUCTIONS if shape == SIZES[1] else ("none", "batchmean"):
            name = f"{dtype} {shape} {reduction}{', log_target' * log_target}"
            options = dict(reduction=reduction, log_target=log_target)
            yield Case(
                "log_target" if log_target else "reductions",
                name,
                "gradients",
                data.rows,
                (shape, shape, log_target),
                options,
                (dtype, dtype),
            )


def _legacy() -> Iterator[Case]:
    reductions = (*REDUCTIONS, "elementwise_mean", "unknown")
    for module, reduction, legacy in itertools.product(
        (False, True), reductions, LEGACY
    ):
        arguments = (*legacy, reduction)
        name = f"{'KLDivLoss' if module else 'kl_div'}{arguments}"
        yield Case(
            "legacy arguments",
            name,
            "call",
            data.pair,
            ((2, 3), (2, 3)),
            dict(module=module, arguments=arguments),
        )


def _shapes() -> Iterator[Case]:
    choices = (
        ("none", False),
        ("mean", False),
        ("batchmean", False),
        ("batchmean", True),
    )
    for (shape, other), (reduction, log_target) in itertools.product(SHAPES, choices):
        yield Case(
            "shapes",
            f"{shape}, {other} {reduction}{', log_target' * log_target}",
            "gradients",
            data.rows,
            (shape, other, log_target),
            dict(reduction=reduction, log_target=log_target),
        )


def _dtypes() -> Iterator[Case]:
    shapes = ((2, 3), (2, 3)), ((), (2,)), ((2,), ())
    for dtypes in itertools.product(DTYPES, repeat=2):
        different = len(set(dtypes)) > 1 and "float32" in dtypes
        for shape, other in shapes if different else shapes[:1]:
            yield Case(
                "dtypes",
                f"{dtypes[0]} {shape}, {dtypes[1]} {other}",
                "gradients",
                data.rows,
                (shape, other),
                dict(reduction="batchmean"),
                dtypes,
            )


def _special() -> Iterator[Case]:
    for dtype, log_target in itertools.product(DTYPES, (False, True)):
        half = dtype in ("float16", "bfloat16")
        yield Case(
            "special values",
            f"{dtype}{', log_target' * log_target}",
            "gradients",
            data.special_in_half_precision if half else data.special,
            (),
            dict(reduction="none", log_target=log_target),
            (dtype, dtype),
        )


def _second_order() -> Iterator[Case]:
    shapes = ((2, 3), (2, 3)), ((2, 3), (1, 3))
    for dtype, log_target in itertools.product(("float32", "float64"), (False, True)):
        for (shape, other), reduction in zip(shapes, ("none", "mean"), strict=True):
            yield Case(
                "second order",
                f"{dtype} {shape}, {other} {reduction}{', log_target' * log_target}",
                "second_order",
                data.second_order,
                (shape, other, log_target, 1.0, -3.0),
                dict(reduction=reduction, log_target=log_target),
                (dtype, dtype),
            )
        for c in ((0.0, 1.0), (1.0, 0.0), (1.0, -3.0)):
            yield Case(
                "second order",
                f"{dtype} special values, cotangents {c}{', log_target' * log_target}",
                "second_order",
                data.special_second_order,
                c,
                dict(reduction="none", log_target=log_target),
                (dtype, dtype),
                # See `NOT_COMPARED`.
                ("d2_input", "d2_target") if c[1] == 0 else (),
            )


def _errors() -> Iterator[Case]:
    call = dict(module=False, arguments=(None, None, "sum"))
    for dtype, position in itertools.product(("int32", "bool", "complex64"), (0, 1)):
        dtypes = (dtype, "float32")[:: 1 - 2 * position]
        yield Case(
            "errors",
            f"{dtypes[0]}, {dtypes[1]}",
            "call",
            data.ones,
            ((3,), (3,)),
            call,
            dtypes,
        )
    for shapes in (((2, 3), (4, 3)), ((2, 3), (2,)), ((0,), (2,))):
        name = f"{shapes[0]}, {shapes[1]}"
        yield Case("errors", name, "call", data.ones, shapes, call)


def _optax() -> Iterator[Case]:
    masks = [(False, (-1, (0, 1))), (True, (-1, None))]
    for name, (where, axes) in itertools.product(OPTAX, masks):
        for axis in axes:
            yield Case(
                "optax",
                f"{name} axis={axis}{', where' * where}",
                "losses",
                data.masked,
                ((4, 3, 6), where, name == "kl_divergence_with_log_targets"),
                dict(name=name, axis=axis),
                peer="optax",
            )
