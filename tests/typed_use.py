"""A user's program, for pyright: what jaxkl's `py.typed` promises."""

from typing import assert_type

import jax
import jax.numpy as jnp

import jaxkl


def use(x: jax.Array, t: jax.Array):
    assert_type(jaxkl.kl_div(x, t, reduction="batchmean"), jax.Array)
    assert_type(jaxkl.KLDivLoss(reduction="sum", log_target=False)(x, t), jax.Array)
    assert_type(jaxkl.distillation_loss(x, x, temperature=2.0), jax.Array)
    assert_type(jaxkl.losses.kl_divergence(x, t), jax.Array)
    assert_type(jaxkl.reference.kl_div(x, t), jax.Array)
    assert_type(jaxkl.top_k_teacher(x, 1), jaxkl.SparseTeacher)
    assert_type(jaxkl.check_distributions(x, t), None)
    assert_type(jaxkl.__version__, str)

    head = jaxkl.LinearHead(jnp.ones((3, 4)), jnp.ones((4, 5)))
    loss, metrics = jaxkl.distillation_loss_with_metrics(
        head, head, divergence=jaxkl.JensenShannon(0.3)
    )
    assert_type(loss, jax.Array)
    assert_type(metrics, jaxkl.DistillationMetrics)


def misuse(x: jax.Array, t: jax.Array):
    print(jaxkl.kl_divergence)  # pyright: ignore[reportAttributeAccessIssue]
    jaxkl.kl_div(x, t, reduction=1)  # pyright: ignore[reportArgumentType]
    jaxkl.kl_div(x)  # pyright: ignore[reportCallIssue]
