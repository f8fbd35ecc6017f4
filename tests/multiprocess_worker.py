"""One of two processes: the sharded loss and all its gradients, for the test to check.

python -m tests.multiprocess_worker HOST:PORT PROCESS OUTPUT.npz
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxkl

from .cases import evaluate, FLOATS, FORWARD, JENSEN_SHANNON
from .sources import make_head


PROCESSES, DEVICES = 2, 4  # of each process
# Meshes of tokens × vocabulary. Few: what costs time is that each is compiled.
MESHES = {"even": ((2, 4), (4, 2)), "odd": ((2, 4), (8, 1))}


def make_cases():
    """Name: student, teacher, divergence with its oracle, other arguments."""
    rng = np.random.default_rng(0)
    cases = {}
    for name, shape, width, vocab, divergence in (
        ("even", (8, 3), 1008, 1001, FORWARD),
        ("odd", (5, 3), 1001, None, JENSEN_SHANNON),
    ):
        real = lambda low, high, shape=shape: jnp.asarray(
            rng.uniform(low, high, size=shape), jnp.float32
        )
        student = make_head(rng, shape, 6, width, bias=True, softcap=4.0)
        teacher = make_head(rng, shape, 4, width, scale=1.5)
        arguments = dict(
            temperature=real(0.5, 3),
            weights=real(0, 2),
            where=real(0, 1) < 0.7,
            labels=jnp.asarray(rng.choice([-100, 0, 3, 1000], size=shape)),
            alpha=0.3,
            vocab_size=vocab,
        )
        cases[name] = student, teacher, divergence, arguments
    return cases


def prefix(name, mesh):
    return f"{name} on {mesh[0]} × {mesh[1]}: "


def spread(mesh, x, spec):
    """A global array, of which each process makes its own part.

    JAX cannot cut evenly what the mesh does not divide: all devices have all of that.
    """
    shards = [1 if axis is None else mesh.shape[axis] for axis in spec]
    if any(n % shards for n, shards in zip(x.shape, shards, strict=False)):
        spec = P()
    x = np.asarray(x)
    return jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, spec), lambda index: x[index]
    )


def spread_head(mesh, head):
    put = partial(spread, mesh)
    return jaxkl.LinearHead(
        put(head.hidden, P("data")),
        put(head.kernel, P(None, "model")),
        None if head.bias is None else put(head.bias, P("model")),
        softcap=head.softcap,
        scale=head.scale,
    )


def evaluate_on(mesh, student, teacher, divergence, arguments):
    student, teacher = (spread_head(mesh, x) for x in (student, teacher))
    arguments = {
        k: spread(mesh, x, P("data")) if isinstance(x, jax.Array) else x
        for k, x in arguments.items()
    }
    axes = dict(mesh=mesh, token_axes="data", vocab_axis="model")
    loss = partial(jaxkl.distillation_loss, **axes)
    value, grads = evaluate(
        student, teacher, loss=loss, divergence=divergence[0], **arguments
    )
    inputs = dict(student=student, teacher=teacher)
    inputs |= {k: arguments[k] for k in grads if k in FLOATS}
    for x, grad in zip(*map(jax.tree.leaves, (inputs, grads)), strict=True):
        assert grad.sharding.is_equivalent_to(x.sharding, x.ndim)
    return dict(grads, value=value)


def main(address, process, output):
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(
        address,
        PROCESSES,
        int(process),
        coordinator_bind_address=address,
        heartbeat_timeout_seconds=20,
        shutdown_timeout_seconds=20,
    )
    assert jax.device_count() == PROCESSES * DEVICES
    results = {}
    for name, case in make_cases().items():
        for shape in MESHES[name]:
            auto = (AxisType.Auto, AxisType.Auto)
            mesh = jax.make_mesh(shape, ("data", "model"), axis_types=auto)
            gathered = process_allgather(evaluate_on(mesh, *case), tiled=True)
            for path, x in jax.tree.leaves_with_path(gathered):
                results[prefix(name, shape) + jax.tree_util.keystr(path)] = x
    if int(process) == 0:
        np.savez(output, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
