"""The value and the gradients of a formula, and whether a recording has them."""

import math

import jax
import jax.numpy as jnp
import numpy as np


class Evaluated:
    """The quantities that were recorded, by one formula, in float64."""

    def __init__(self, formula, arrays, names):
        x, t = (jnp.asarray(arrays[n], jnp.float64) for n in ("input", "target"))
        mask = jnp.asarray(arrays["mask"], bool) if "mask" in arrays else None
        self.formula = formula
        self.values, self.sizes = {}, {}
        with jax.numpy_rank_promotion("allow"):
            loss, size = formula(x, t, mask)
            if names & {"grad_input", "grad_target"}:
                total = lambda x, t: jnp.sum(formula(x, t, mask)[0])
                grads = jax.grad(total, (0, 1))(x, t)
                for name, grad in zip(
                    ("grad_input", "grad_target"), grads, strict=True
                ):
                    self.values[name] = np.asarray(grad)
                    finite = np.where(np.isfinite(grad), np.abs(grad), 0)
                    self.sizes[name] = np.max(finite, initial=0)
        self.values["loss"], self.sizes["loss"] = np.asarray(loss), np.asarray(size)

    def agrees(self, name, arrays):
        recorded, value = arrays[name].astype(np.float64), self.values[name]
        dtypes = {arrays[n].dtype for n in ("input", "target", name)}
        eps = max(float(jnp.finfo(d).eps) for d in dtypes)
        # A sum is in float32 at least, and its rounding errors are a random walk.
        terms = arrays["input"].size if name == "loss" and value.ndim == 0 else 1
        tol = 4 * eps + math.sqrt(terms) * min(eps, float(np.finfo(np.float32).eps))
        recorded = recorded.reshape(value.shape)
        special = ~np.isfinite(value)
        with np.errstate(invalid="ignore"):
            same = (recorded == value) | (np.isnan(recorded) & np.isnan(value))
            near = np.abs(recorded - value) <= tol * self.sizes[name]
        return bool(np.where(special, same, near).all())
