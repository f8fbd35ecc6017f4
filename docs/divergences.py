"""Draws the figure on the page about divergences: one peak, fitted to two.

A student with one peak, of any position and width, learns from a teacher with two. It
cannot have both, and each divergence leaves out something else. `python
docs/divergences.py` writes docs/images/divergences.png.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxkl


PICTURE = Path(__file__).parent / "images" / "divergences.png"
SHOWN = {
    "ForwardKL()": jaxkl.ForwardKL(),
    "JensenShannon(0.5)": jaxkl.JensenShannon(0.5),
    "JensenShannon(0.9)": jaxkl.JensenShannon(0.9),
    "ReverseKL()": jaxkl.ReverseKL(),
}
PLACE = jnp.linspace(-4.0, 4.0, 81)


def peak(parameters):
    middle, log_width = parameters
    return -(((PLACE - middle) / jnp.exp(log_width)) ** 2) / 2


def teacher_logits():
    left, right = peak(jnp.array([-1.5, -1.0])), peak(jnp.array([1.5, -0.5]))
    return jnp.logaddexp(jnp.log(0.65 / jnp.exp(-1.0)) + left, right)


def fit(divergence):
    """Runs gradient descent from several starts and returns the best end."""

    def loss(parameters):
        return jaxkl.distillation_loss(
            peak(parameters), teacher_logits(), divergence=divergence
        )

    def step(parameters, _):
        slope = jax.grad(loss)(parameters)
        slope /= jnp.maximum(jnp.linalg.norm(slope), 1)
        return parameters - 0.02 * slope, None

    def descend(start):
        end, _ = jax.lax.scan(step, start, length=3000)
        return end, loss(end)

    starts = [[middle, width] for middle in (-2.0, 0.0, 2.0) for width in (-1.0, 0.5)]
    ends, losses = jax.jit(jax.vmap(descend))(jnp.array(starts))
    return ends[jnp.argmin(losses)]


def main():
    figure, axes = plt.subplots(2, 2, figsize=(6, 3.8), sharey=True, layout="tight")
    axes = axes.flat
    teacher = np.asarray(jax.nn.softmax(teacher_logits()))
    for axis, (name, divergence) in zip(axes, SHOWN.items(), strict=True):
        student = np.asarray(jax.nn.softmax(peak(fit(divergence))))
        axis.fill_between(PLACE, teacher, color="#c9d3dc", label="teacher")
        axis.plot(PLACE, student, color="#0072b2", lw=2, label="student")
        axis.set_title(name, fontsize=15)
        axis.set(xticks=[], yticks=[])
    axes[0].legend(fontsize=12, frameon=False, loc="upper right")
    figure.savefig(PICTURE, dpi=200)
    print(f"Wrote {PICTURE}")


if __name__ == "__main__":
    main()
