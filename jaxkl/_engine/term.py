r"""A term of a token's loss: what all of them have.

A loss is $\sum_i \sum_\tau w_{i\tau}\, \tau(z_i)$, and a `Term` is one $\tau$ with its
weights and its own arrays. A new one is a frozen dataclass that derives from `Term` and
is registered as a pytree: `student_terms` has the shortest.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from .._math.numerics import weigh, zero_unless
from .._math.softmax import Softmax
from .row_stats import Columns, Statistic


class Gradients(NamedTuple):
    """Those of weighted terms with respect to logits, `[B, V]`, and temperatures,
    `[B]`, by their names.

    Those of temperatures are sums over the columns at hand.
    """

    logits: dict[str, Any]
    temperatures: dict[str, Any]

    def plus(self, other: "Gradients") -> "Gradients":
        return Gradients(*map(_added, self, other))


def _added(x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    return x | {name: x[name] + d if name in x else d for name, d in y.items()}


class TermResult(NamedTuple):
    """What a term makes of the columns at hand, once it knows of all others."""

    sums: Any  # over the columns, of which `value` is made
    gradients: Gradients
    lse: jax.Array  # [B]; only its finiteness is used


@dataclasses.dataclass(frozen=True)
class Term(abc.ABC):
    """`weight · value` of each token.

    Columns may be the whole vocabulary, a device's slice of it, or a block of a few. A
    column learns of the others in phases, each of which makes sums over the columns at
    hand. The caller adds up those of all columns, and gives them to the next phase.
    """

    # Whether a backward pass that has the statistics of a row already should make the
    # logits one array first.
    has_long_gradient: ClassVar[bool] = False

    weight: Any  # [B], or several a token, [B, k]

    @property
    def is_weighted(self) -> jax.Array:
        """Whether a token has a weight that is not 0, bool `[B]`."""
        return jnp.any(self.weight != 0, axis=range(1, self.weight.ndim))

    def whole_flags(self) -> Self:
        """A flag for each array: whether its gradient is whole on each device that has
        a slice of the vocabulary, and not a sum over these."""
        return jax.tree.map(lambda _: True, self)

    @abc.abstractmethod
    def statistics(self, c: Columns) -> Sequence[Statistic]:
        """What it must know of all columns of a row."""

    def slope_sums(self, c: Columns) -> Any:
        """Sums over the columns at hand that need the statistics, if there are any."""
        del c
        return ()

    def combined(self, of_all: Columns, slopes: Any) -> Any:
        """What it makes of all columns at once, before the last phase."""
        del of_all
        return slopes

    @abc.abstractmethod
    def finish(self, c: Columns, combined: Any, *, recompute: bool) -> TermResult:
        """The last phase; `recompute` is that of a `Plan`."""

    @abc.abstractmethod
    def value(self, of_all: Columns, combined: Any, sums: Any) -> jax.Array:
        """The value of each token, of the shape of its weight."""


def d_logits(
    weight: jax.Array, d_z: jax.Array, model: Softmax, temperature: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of `weight · D`: by the logits, `[B, V]`, and the temperature, `[B]`.

    The second is a sum over this device's columns. It is summed over devices once,
    outside, as is the gradient of hidden states.
    """
    if temperature is None:
        return weigh(weight[:, None], d_z), None
    # The temperature of a token without weight may be NaN, and that of padding is 0.
    weight = weigh(weight, 1 / temperature)
    # ∂D/∂T = -Σ d_z · z / T. As Σ d_z = 0, the maximum may be subtracted from z,
    # which leaves fewer digits to cancel. Where d_z is 0, z may be infinite.
    d_temperature = -jnp.sum(d_z * zero_unless(d_z != 0, model.shifted), axis=-1)
    return weigh(weight[:, None], d_z), weigh(weight, d_temperature)
