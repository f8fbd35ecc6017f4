"""Defines one loss in four ways, and in float64: the mean of `T² D(teacher, student)`.

Each function makes the loss of a named divergence on logits `[tokens, vocab]`.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxkl


T = 2.0
DIVERGENCES = {
    "forward-kl": jaxkl.ForwardKL(),
    "reverse-kl": jaxkl.ReverseKL(),
    "jensen-shannon": jaxkl.JensenShannon(),
}


def with_jaxkl(name, **options):
    def loss(student, teacher):
        return jaxkl.distillation_loss(
            student, teacher, divergence=DIVERGENCES[name], temperature=T, **options
        )

    return loss


def _kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _by_name(name, kl, log_mean_exp):
    """Makes the divergence of `log_p` and `log_q` from a function for the KL."""

    def jensen_shannon(log_p, log_q):
        log_m = log_mean_exp(log_p, log_q)
        return 0.5 * kl(log_p, log_m) + 0.5 * kl(log_q, log_m)

    return {
        "forward-kl": kl,
        "reverse-kl": lambda log_p, log_q: kl(log_q, log_p),
        "jensen-shannon": jensen_shannon,
    }[name]


def _log_mean_exp(x, y):
    return jnp.logaddexp(x, y) - np.log(2).astype(x.dtype)


def _in_jax(divergence):
    def loss(student, teacher):
        student, teacher = (x.astype(jnp.float32) / T for x in (student, teacher))
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher))
        return T * T * jnp.mean(divergence(log_p, jax.nn.log_softmax(student)))

    return loss


def with_plain_jax(name):
    """Makes the usual loss: `log_softmax` and a sum."""
    return _in_jax(_by_name(name, _kl, _log_mean_exp))


def with_optax(name):
    from optax.losses import kl_divergence_with_log_targets

    def kl(log_p, log_q):
        return kl_divergence_with_log_targets(log_q, log_p)

    return _in_jax(_by_name(name, kl, _log_mean_exp))


def with_ejkernel(name):
    from ejkernel.kernels._xla.fused_kl_divergence import fused_kl_divergence

    direction = {
        "forward-kl": "forward",
        "reverse-kl": "reverse",
        "jensen-shannon": "jsd",
    }[name]

    def loss(student, teacher):
        teacher = jax.lax.stop_gradient(teacher)
        return fused_kl_divergence(student, teacher, direction=direction, temperature=T)

    return loss


def with_torch(name):
    import torch
    import torch.nn.functional as F

    def kl(log_p, log_q):
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def log_mean_exp(x, y):
        return torch.logaddexp(x, y) - float(np.log(2))

    divergence = _by_name(name, kl, log_mean_exp)

    def loss(student, teacher):
        log_q = torch.log_softmax(student / T, dim=-1)
        log_p = torch.log_softmax(teacher / T, dim=-1)
        return T * T * divergence(log_p, log_q)

    return loss


def in_float64(name, student, teacher):
    """Computes the sum over tokens, not the mean, and its gradient, in NumPy."""

    def log_softmax(logits):
        x = logits.astype(np.float64) / T
        x -= x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_q, log_p = log_softmax(student), log_softmax(teacher)
    q, p = np.exp(log_q), np.exp(log_p)
    if name == "forward-kl":
        f, f_q = p * (log_p - log_q), -p  # f_q is the derivative of f by log_q
    elif name == "reverse-kl":
        f = q * (log_q - log_p)
        f_q = f + q
    else:
        log_m = np.logaddexp(log_p, log_q) - np.log(2)
        f_q = 0.5 * q * (log_q - log_m)
        f = 0.5 * p * (log_p - log_m) + f_q
    return T * T * f.sum(), T * (f_q - q * f_q.sum(-1, keepdims=True))
