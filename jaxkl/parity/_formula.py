"""A KL loss as one may have written it: rightly, or with a classic mistake."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from ._errors import ParityError


# How an array is changed before it is used; logits are divided by T before.
CHANGES: dict[str, Any] = {
    "": lambda x: x,
    "log": jnp.log,
    "exp": jnp.exp,
    "log_softmax": jax.nn.log_softmax,
    "softmax": jax.nn.softmax,
}


@dataclasses.dataclass(frozen=True)
class Formula:
    """`kl_div(input, target)` over the rows that count, times T²."""

    reduction: str
    log_target: bool
    temperature: float = 1.0
    t_squared: bool = True
    input: str = ""  # of `CHANGES`
    target: str = ""
    divided: bool = True  # logits, by T
    reverse: bool = False
    cross_entropy: bool = False
    masked: bool = False
    # Where padding is: nowhere, in the "count" of rows only, or in the sum too, "all".
    padding: str = "none"

    def __call__(self, x, t, mask=None):
        """The loss, and the sum of the magnitudes of its terms, for its rounding."""
        x, t = self._changed(self.input, x), self._changed(self.target, t)
        first, second = self._terms(x, t)
        first, second = jnp.broadcast_arrays(first, second)
        if mask is not None and self.padding != "all":
            counted = mask.reshape(mask.shape + (1,) * (first.ndim - mask.ndim))
            first, second = (jnp.where(counted, a, 0) for a in (first, second))
        sizes = jnp.abs(first) + jnp.abs(second)
        factor = self.temperature**2 if self.t_squared else 1.0
        if self.reduction != "none":
            factor /= self._divisor(x, first.shape, mask)
            return factor * jnp.sum(first + second), factor * jnp.sum(sizes)
        return factor * (first + second), factor * sizes

    def _changed(self, change, x):
        return CHANGES[change](x / self.temperature if self._divides(change) else x)

    def _divides(self, change):
        return "softmax" in change and self.divided and self.temperature != 1

    def _terms(self, x, t):
        if self.reverse:
            log_t = t if self.log_target else jnp.log(t)
            return jnp.exp(x) * x, -jnp.exp(x) * log_t
        p = jnp.exp(t) if self.log_target else t
        if self.cross_entropy:
            return -p * x, jnp.zeros_like(p * x)
        return (p * t if self.log_target else xlogy(p, p)), -p * x

    def _divisor(self, x, shape, mask):
        if self.reduction == "sum":
            return 1
        width = shape[-1] if shape else 1
        rows = math.prod(shape[:-1]) or 1
        if mask is not None and self.padding == "none":
            rows = jnp.sum(jnp.broadcast_to(mask, shape[:-1]), dtype=x.dtype)
        elif self.reduction == "batchmean" and mask is None:
            return x.shape[0] if x.ndim else 1
        return rows * width if self.reduction == "mean" else rows

    def __str__(self):
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
        return text + rows[self.padding]

    def _shown(self, change, name):
        if self._divides(change):
            name += f" / {self.temperature:g}"
        return f"{change}({name})" if change else name


def check_temperature(temperature: float, where: str = "") -> None:
    """T² is what is used: it must be a number, too."""
    if not (temperature > 0 and 0 < temperature * temperature < math.inf):
        raise ParityError(
            f"{where}`temperature` must be positive and finite, and its square too, "
            f"got {temperature:g}"
        )
