"""A user's program, for pyright: what jaxkl's `py.typed` promises."""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

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
    assert_type(metrics.kl, jax.Array)
    assert_type(metrics.cross_entropy, jax.Array | None)
    assert_type(metrics + metrics, jaxkl.DistillationMetrics)
    assert_type(metrics.to_dict(), dict[str, float])
    assert_type(head.kernel, jax.Array)


def arguments(x: np.ndarray, mesh: Mesh):
    """Whatever can be an array is one."""
    head = jaxkl.LinearHead(x, x.T, softcap=30.0)
    teacher = jaxkl.SparseTeacher(x.astype(int), x, tail="bucket")
    function = jaxkl.FunctionHead(lambda kernel, x: x @ kernel, x.T, x)
    jaxkl.distillation_loss(function, function)
    jaxkl.distillation_loss(head, teacher, temperature=x, weights=x, z_loss=1e-4)
    jaxkl.distillation_loss(x, x, labels=x, alpha=0.5, where=x > 0, normalizer=7)
    moving = jaxkl.Mixture([(x, jaxkl.SymmetricKL(x)), (0.5, jaxkl.ReverseKL())])
    jaxkl.distillation_loss(x, x, divergence=moving)
    jaxkl.distillation_loss(x, x, mesh=mesh, token_axes=["data"], vocab_axis="model")
    jaxkl.distillation_loss(x, x, divergence=lambda log_p, log_q: log_p - log_q)
    jaxkl.reference.distillation_loss(head, x, mesh=mesh, token_axes="data")


def misuse(x: jax.Array, t: jax.Array):
    jaxkl.JensenShannon("0.5")  # pyright: ignore[reportArgumentType]
    jaxkl.ReverseKL(0.5)  # pyright: ignore[reportCallIssue]
    jaxkl.Mixture((0.5, jaxkl.ForwardKL()))  # pyright: ignore[reportArgumentType]
    print(jaxkl.kl_divergence)  # pyright: ignore[reportAttributeAccessIssue]
    jaxkl.kl_div(x, t, reduction=1)  # pyright: ignore[reportArgumentType]
    jaxkl.kl_div(x)  # pyright: ignore[reportCallIssue]
    jaxkl.distillation_loss(x, t, statistics=True)  # pyright: ignore[reportCallIssue]
    jaxkl.distillation_loss(x, t, mask=x)  # pyright: ignore[reportCallIssue]
    jaxkl.distillation_loss(x, t, 2.0)  # pyright: ignore[reportCallIssue]
    jaxkl.distillation_loss("x", t)  # pyright: ignore[reportArgumentType]
    jaxkl.distillation_loss(x, t, labels="t")  # pyright: ignore[reportArgumentType]
    jaxkl.distillation_loss(x, t, reduction="total")  # pyright: ignore[reportArgumentType]
    jaxkl.distillation_loss(x, t, mesh="mesh")  # pyright: ignore[reportArgumentType]
    jaxkl.LinearHead("x", t)  # pyright: ignore[reportArgumentType]
    # A list is a teacher, not a student.
    jaxkl.distillation_loss(jaxkl.top_k_teacher(x, 1), t)  # pyright: ignore[reportArgumentType]
