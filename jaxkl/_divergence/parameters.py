"""Parameters of divergences: Python numbers, or arrays that move while one trains.

A number is part of the program. An array is one of its inputs, so that a schedule
compiles once. For this a divergence is split in two: a static part, which is hashable
and has a `Slot` in the place of each array, and the arrays.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .._util import checks as check


_T = TypeVar("_T")


class Interval(NamedTuple):
    """The values of a parameter, all finite.

    An end that is open is an error for a number. An array may hold it, as a schedule
    that starts or ends there does, and gives the limit.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __str__(self):
        left, right = "(["[not self.open_low], ")]"[not self.open_high]
        return f"{left}{self.low}, {self.high}{right}"

    @property
    def inside(self) -> float:
        """A value that is at neither end."""
        return 0.5

    def has_number(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        return above and (x < self.high if self.open_high else x <= self.high)

    def has(self, x: Any) -> Any:
        """Whether the interval with its ends has each entry of an array."""
        return (x >= self.low) & (x <= self.high) & (abs(x) < float("inf"))


REAL = Interval(-float("inf"), float("inf"), open_low=True, open_high=True)


class Slot(NamedTuple):
    """Stands for an array in the static part of a divergence."""

    number: int

    def __repr__(self):
        return "<array>"


class Parametrised:
    """A frozen dataclass, some fields of which are parameters."""

    intervals: ClassVar[dict[str, Interval]] = {}  # of these fields

    def map_parameters(self, f: Callable[[str, Interval, Any], Any]) -> Self:
        """`f(name, interval, value)` in the place of every parameter, unchecked."""
        return self.replaced(
            {
                name: f(name, interval, getattr(self, name))
                for name, interval in self.intervals.items()
            }
        )

    def replaced(self, values: dict[str, Any]) -> Self:
        """A copy with other values in these fields, unchecked."""
        # They may be anything that JAX puts in the place of a leaf.
        other = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(other, name, value)
        return other


class Parameter(NamedTuple):
    """A parameter that is an array."""

    name: str
    interval: Interval
    value: Any

    def checked(self, shape: tuple[int, ...]) -> jax.Array:
        """The array, a scalar or of `shape`."""
        x = check.float_array(self.name, self.value)
        if x.ndim:
            check.of_shape(self.name, x, shape, "no shape or the batch shape")
        return x


def as_operand(
    x: jax.Array,
    interval: Interval,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    mask: jax.Array | None,
) -> jax.Array:
    """A parameter of each token, `[B]`: a constant to differentiation.

    It is NaN where it is out of range, but for tokens outside `mask`.
    """
    x = jnp.broadcast_to(jax.lax.stop_gradient(x).astype(dtype), shape).reshape(-1)
    x = jnp.where(interval.has(x), x, jnp.nan)
    return x if mask is None else jnp.where(mask, x, interval.inside)


def split(x: Any) -> tuple[Any, list[Parameter]]:
    """The static part, and the parameters that are arrays."""
    if not isinstance(x, Parametrised):
        return x, []
    arrays = []

    def take(name, interval, value):
        if check.is_number(value):
            return value
        arrays.append(Parameter(name, interval, value))
        return Slot(len(arrays) - 1)

    static = x.map_parameters(take)
    return (static, arrays) if arrays else (x, [])


def join(static: Any, arrays: Sequence[Any]) -> Any:
    """The whole of a static part and its arrays."""
    if not arrays:
        return static

    def put(name, interval, value):
        del name, interval
        return arrays[value.number] if isinstance(value, Slot) else value

    return static.map_parameters(put)


def with_numbers(static: Any) -> Any:
    """The static part with numbers from the inside of their intervals for arrays."""
    if not isinstance(static, Parametrised):
        return static
    return static.map_parameters(
        lambda _, interval, value: interval.inside if isinstance(value, Slot) else value
    )


def as_pytree(cls: type[_T]) -> type[_T]:
    """The dataclass as a pytree, whose leaves are its arrays."""

    def flatten(x):
        static, arrays = split(x)
        return [parameter.value for parameter in arrays], static

    jax.tree_util.register_pytree_node(cls, flatten, join)
    return cls


def check_parameter(name: str, value: Any, interval: Interval) -> None:
    """Checks a number, and an array whose values are known."""
    if check.is_number(value):
        if not interval.has_number(value):
            raise ValueError(f"`{name}` must be in {interval}, got {value}.")
        return
    if isinstance(value, bool) or not hasattr(value, "dtype"):
        kind = type(value).__name__
        raise TypeError(
            f"`{name}` must be a Python number or an array of floats, got {value!r} "
            f"({kind})."
        )
    x = check.float_array(name, value)
    if check.is_known(x):
        values = np.asarray(x, np.float64)
        good = interval.has(values)
        if not good.all():
            ends = f"[{interval.low}, {interval.high}]"
            raise ValueError(
                f"`{name}` must be finite and in {ends}, got {values[~good].flat[0]}."
            )


def over_columns(parameter: Any, like: jax.Array) -> Any:
    """A parameter for terms of the shape `[..., V]` of `like`.

    A number stays one. An array, `[...]`, gets axes at its end.
    """
    if check.is_number(parameter):
        return parameter
    x = jax.lax.stop_gradient(jnp.asarray(parameter)).astype(like.dtype)
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
