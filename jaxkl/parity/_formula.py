"""`kl_div` as a formula whose parts can be changed: right, or mistaken."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy


# How an array is changed before it is used. Logits are divided by T first.
CHANGES: dict[str, Callable[..., jax.Array]] = {
    "": lambda x: x,
    "log": jnp.log,
    "exp": jnp.exp,
    "log_softmax": jax.nn.log_softmax,
    "softmax": jax.nn.softmax,
}
# Which rows are summed, and by how many the sum is divided.
ROWS = {
    "all": "",
    "mask": ", rows of mask",
    "count": ", rows of mask, divided by all",
    "nonzero": ", rows whose target is not 0",
}


@dataclasses.dataclass(frozen=True)
class Formula:
    """`kl_div(input, target)` over the rows that count, times T²: right or mistaken."""

    reduction: str  # of `kl_div`, or "rows": the mean over rows
    log_target: bool
    temperature: float = 1.0
    rows: str = "all"  # a key of `ROWS`
    t_squared: bool = True
    input: str = ""  # a key of `CHANGES`
    target: str = ""
    divided: bool = True  # whether logits are divided by T
    terms: str = "KL"  # or "reverse", or "cross-entropy"
    # Whether the arrays are logits of a student and a teacher, in this order.
    of_models: bool = False

    def __call__(
        self, x: jax.Array, t: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The loss, and the sum of its terms' magnitudes, which bounds its rounding."""
        kept = jnp.any(t != 0, -1) if self.rows == "nonzero" else mask
        x, t = self._changed(self.input, x), self._changed(self.target, t)
        first, second = jnp.broadcast_arrays(*self._terms(x, t))
        shape = first.shape
        rows: Any = math.prod(shape[:-1])
        if kept is not None and self.rows != "all":
            if self.rows != "count":
                rows = jnp.sum(jnp.broadcast_to(kept, shape[:-1]), dtype=x.dtype)
            kept = kept[..., None] if shape else kept
            first, second = (jnp.where(kept, a, 0) for a in (first, second))
        of_first_axis = self.reduction == "batchmean" and self.rows == "all"
        divisor = {
            "mean": rows * (shape[-1] if shape else 1),
            "batchmean": (x.shape or (1,))[0] if of_first_axis else rows,
            "rows": rows,
        }.get(self.reduction, 1)
        factor = (self.temperature**2 if self.t_squared else 1.0) / divisor
        total = jnp.sum if self.reduction != "none" else lambda terms: terms
        sizes = jnp.abs(first) + jnp.abs(second)
        return factor * total(first + second), factor * total(sizes)

    def _changed(self, change: str, x: jax.Array) -> jax.Array:
        return CHANGES[change](x / self.temperature if self._divides(change) else x)

    def _divides(self, change: str) -> bool:
        return "softmax" in change and self.divided and self.temperature != 1

    def _terms(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.terms == "reverse":
            log_t = t if self.log_target else jnp.log(t)
            return jnp.exp(x) * x, -jnp.exp(x) * log_t
        p = jnp.exp(t) if self.log_target else t
        if self.terms == "cross-entropy":
            return -p * x, jnp.zeros_like(p * x)
        return (p * t if self.log_target else xlogy(p, p)), -p * x

    def __str__(self) -> str:
        x, t = self._shown(self.input, "input"), self._shown(self.target, "target")
        reduction = self.reduction.replace("rows", "sum")
        options = f'reduction="{reduction}"'
        if self.terms == "reverse":
            log_t = t if self.log_target else f"log({t})"
            text = f"kl_div({log_t}, exp({x}), {options})"
        elif self.terms == "cross-entropy":
            p = f"exp({t})" if self.log_target else t
            text = f"-({p} * {x}), {options}"
        else:
            text = f"kl_div({x}, {t}, {options}{', log_target=True' * self.log_target})"
        text += " / rows" * (self.reduction == "rows")
        if self.t_squared and self.temperature != 1:
            text += f" * {self.temperature:g}**2"
        return text + ROWS[self.rows]

    def _shown(self, change: str, name: str) -> str:
        if self._divides(change):
            name += f" / {self.temperature:g}"
        return f"{change}({name})" if change else name


def as_models(text: str) -> str:
    """The text with the names of models for those of `kl_div`'s arguments."""
    return re.sub(r"(?<!log_)target", "teacher", text.replace("input", "student"))
