"""Cells for given log-probabilities: `kl_div` and optax's `kl_divergence`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxkl

from .harness import (
    against_peers,
    BYTES,
    bytes_alone,
    Cell,
    jax_work,
    measure,
    Peer,
    Result,
)
from .torch_peers import torch_peers


BOUNDS = {  # time against torch.compile, and against the best of the others
    "kl_div-forward": (1.0, 0.7),
    "kl_div-log-forward": (1.0, 1.0),
    "kl_div-grad": (1.0, 0.8),
    "kl_div-log-grad": (1.0, 1.05),
    "losses-kl-grad": (1.0, 0.8),
}


def with_jaxkl(name):
    if name.startswith("losses"):
        return lambda x, t: jnp.mean(jaxkl.losses.kl_divergence(x, t))
    log_target = "log" in name
    return lambda x, t: jaxkl.kl_div(x, t, reduction="batchmean", log_target=log_target)


def with_plain_jax(name):
    """Makes the usual formula, in which `0 log 0` is 0."""
    if "log" in name:
        return lambda x, t: jnp.sum(jnp.exp(t) * (t - x)) / len(x)
    xlogy = jax.scipy.special.xlogy
    return lambda x, t: jnp.sum(xlogy(t, t) - t * x) / len(x)


def with_optax(name):
    from optax import losses

    if "log" in name:
        kl = losses.kl_divergence_with_log_targets
    else:
        kl = losses.kl_divergence
    return lambda x, t: jnp.mean(kl(x, t))


def with_torch(name):
    import torch.nn.functional as F

    log_target = "log" in name
    return lambda x, t: F.kl_div(x, t, reduction="batchmean", log_target=log_target)


def log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def run(name, settings):
    tokens, vocab = (16, 1000) if settings.smoke else (512, 32000)
    gradient = name.endswith("grad")
    rng = np.random.default_rng(0)
    log_q, log_p = (log_softmax(rng.normal(0, 2, (tokens, vocab))) for _ in range(2))
    target = log_p if "log" in name else np.exp(log_p)
    arrays = [x.astype(np.float32) for x in (log_q, target)]
    value = np.sum(np.exp(log_p) * (log_p - log_q)) / tokens
    expected = (value, -np.exp(log_p) / tokens)[: 2 if gradient else 1]
    on_device = jax.device_put(arrays)

    def peer(title, make_loss, **more):
        def prepare():
            loss = make_loss(name)
            return jax_work(jax.value_and_grad(loss) if gradient else loss, *on_device)

        return Peer(title, prepare, expected, **more)

    peers = [
        peer("jaxkl", with_jaxkl, optional=False),
        peer("plain JAX", with_plain_jax, optional=False),
        peer("optax", with_optax),
        bytes_alone(on_device, gradient),
        *torch_peers(partial(with_torch, name), arrays, int(gradient), expected),
    ]
    rows = measure(peers, settings)
    return Result(
        rows, against_peers(rows, *BOUNDS[name]), ("plain JAX", "torch.compile", BYTES)
    )


def _title(name):
    function = "losses.kl_divergence" if name.startswith("losses") else "kl_div"
    how = "log_target=True, " if "log" in name else ""
    what = "value and gradient" if name.endswith("grad") else "value"
    return f"{function}, {how}[512, 32000] float32: {what}"


CELLS = [Cell(name, _title(name), partial(run, name)) for name in BOUNDS]
