"""One of two processes: the sharded loss and all its gradients, for the test to check.

python -m tests.multiprocess_worker HOST:PORT PROCESS OUTPUT.npz
"""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxkl

from . import oracle
from .alone import pull_back
from .cases import evaluate, FLOATS, FORWARD, JENSEN_SHANNON
from .sources import make_function, make_head, per_token


PROCESSES, DEVICES = 2, 4  # of each process
# Meshes of tokens × vocabulary. Few: what costs time is that each is compiled.
MESHES = {"even": ((2, 4), (4, 2)), "odd": ((2, 4), (8, 1)), "function": ((2, 4),)}
ALONE_MESH = 2, 4
SPECS = dict(scale=P(), kernel=P(None, "model"), bias=P("model"), absent=None)


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
    cases["function"] = make_function_case(rng)
    return cases


def make_function_case(rng):
    """A function as the student's head, and a mixture with a weight for each token."""
    shape = (8, 3)
    student = replace(make_function(rng, shape, 6, 96), param_specs=SPECS)
    arguments = per_token(rng, shape, "temperature", "where")
    w = jnp.asarray(rng.uniform(size=shape), jnp.float32)
    terms = (w, jaxkl.ReverseKL()), (0.5, jaxkl.JensenShannon(0.3))
    of_token = lambda w: oracle.mixture(
        (w, oracle.reverse_kl), (0.5, oracle.jensen_shannon(0.3))
    )
    kept = np.asarray(w, np.float64)[np.asarray(arguments["where"])]
    divergence = jaxkl.Mixture(terms), oracle.by_token(list(map(of_token, kept)))
    return student, make_head(rng, shape, 4, 96), divergence, arguments


def make_alone_cases():
    """Function of the student alone: floats, other arrays, cotangents, options."""
    rng = np.random.default_rng(1)
    shape, vocab = (8, 3), 1001
    student = make_head(rng, shape, 6, 1008, bias=True, softcap=4.0)
    arrays = per_token(
        rng, shape, "weights", "temperature", "labels", "where", vocab=vocab
    )
    weights, temperature, labels, where = arrays.values()
    tokens = jnp.asarray(rng.choice([-1, 0, 3, 1000], size=(*shape, 2)))
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    smoothed = dict(label_smoothing=0.1, z_loss=1e-2, reduction="none")
    return {
        "cross_entropy": (
            dict(student=student, weights=weights),
            dict(labels=labels, where=where),
            normal(*shape),
            dict(smoothed, vocab_size=vocab),
        ),
        "token_log_probs": (
            dict(student=student, temperature=temperature),
            dict(tokens=tokens, where=where),
            (normal(*shape, 2), normal(*shape)),
            dict(with_entropy=True, vocab_size=vocab),
        ),
    }


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
    if isinstance(head, jaxkl.FunctionHead):
        params = {
            name: None if x is None else put(x, SPECS[name])
            for name, x in head.params.items()
        }
        return replace(head, params=params, hidden=put(head.hidden, P("data")))
    return jaxkl.LinearHead(
        put(head.hidden, P("data")),
        put(head.kernel, P(None, "model")),
        None if head.bias is None else put(head.bias, P("model")),
        softcap=head.softcap,
        scale=head.scale,
    )


def spread_rows(mesh, arguments):
    """Their arrays, spread over the tokens."""
    put = lambda x: spread(mesh, x, P("data")) if isinstance(x, jax.Array) else x
    return jax.tree.map(put, arguments)


def evaluate_on(mesh, student, teacher, divergence, arguments):
    student, teacher = (spread_head(mesh, x) for x in (student, teacher))
    arguments = spread_rows(mesh, arguments)
    divergence = spread_rows(mesh, divergence[0])
    axes = dict(mesh=mesh, token_axes="data", vocab_axis="model")
    loss = partial(jaxkl.distillation_loss, **axes)
    value, grads = evaluate(
        student, teacher, loss=loss, divergence=divergence, **arguments
    )
    inputs = dict(student=student, teacher=teacher)
    inputs |= {k: arguments[k] for k in grads if k in FLOATS}
    for x, grad in zip(*map(jax.tree.leaves, (inputs, grads)), strict=True):
        assert grad.sharding.is_equivalent_to(x.sharding, x.ndim)
    return dict(grads, value=value)


def evaluate_alone_on(mesh, name, floats, others, cotangents, options):
    student = spread_head(mesh, floats["student"])
    floats, others, cotangents = (
        spread_rows(mesh, x) for x in (floats | dict(student=None), others, cotangents)
    )
    axes = dict(mesh=mesh, token_axes="data", vocab_axis="model")
    f = partial(getattr(jaxkl, name), **axes, **options)
    value, grads = pull_back(f, floats | dict(student=student), cotangents, **others)
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

    def gather(name, shape, evaluate_on, *case):
        auto = (AxisType.Auto, AxisType.Auto)
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=auto)
        gathered = process_allgather(evaluate_on(mesh, *case), tiled=True)
        for path, x in jax.tree.leaves_with_path(gathered):
            results[prefix(name, shape) + jax.tree_util.keystr(path)] = x

    for name, case in make_cases().items():
        for shape in MESHES[name]:
            gather(name, shape, evaluate_on, *case)
    for name, case in make_alone_cases().items():
        gather(name, ALONE_MESH, evaluate_alone_on, name, *case)
    if int(process) == 0:
        np.savez(output, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
