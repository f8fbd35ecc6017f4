# `make run ARGS="examples/sharded_head.py"` builds an environment and runs this.
"""Distils a head whose vocabulary and tokens are sharded over 8 devices.

The batch is sharded over the mesh axis "data" and the head over "model". No device ever
holds all logits or the whole head. The same steps on one device give the same losses.
The devices are virtual CPU devices unless you pass `--real`.
"""

import argparse
import sys

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxkl


def train(args, loss_fn, place):
    """Trains a student head on a wider teacher's; returns the losses and the head."""
    keys = jax.random.split(jax.random.key(0), 4)
    normal = lambda key, *shape: jax.random.normal(key, shape) / shape[-2] ** 0.5
    kernel = place(normal(keys[0], args.hidden, args.vocab), P(None, "model"))
    teacher_kernel = normal(keys[1], 2 * args.hidden, args.vocab)
    teacher_kernel = place(teacher_kernel, P(None, "model"))

    optimizer = optax.sgd(100.0)

    @jax.jit
    def step(kernel, state, hidden, teacher):
        loss, grad = jax.value_and_grad(
            lambda kernel: loss_fn(jaxkl.LinearHead(hidden, kernel), teacher)
        )(kernel)
        updates, state = optimizer.update(grad, state)
        return optax.apply_updates(kernel, updates), state, loss

    state, losses = optimizer.init(kernel), []
    hidden = place(jax.random.normal(keys[2], (args.tokens, args.hidden)), P("data"))
    wide = jax.random.normal(keys[3], (args.tokens, 2 * args.hidden))
    teacher = jaxkl.LinearHead(place(wide, P("data")), teacher_kernel)
    for _ in range(args.steps):
        kernel, state, loss = step(kernel, state, hidden, teacher)
        losses.append(float(loss))
    return np.array(losses), kernel


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"data": 2, "model": 4, "tokens": 1024, "hidden": 128, "vocab": 8192}
    for name, size in (sizes | {"steps": 5}).items():
        parser.add_argument(f"--{name}", default=size, type=int, help=f"{size}")
    parser.add_argument("--real", action="store_true", help="use the real devices")
    args = parser.parse_args()
    # By default JAX multiplies float32 matrices in lower precision on a GPU or TPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    shape = args.data, args.model
    if not args.real:  # must run before JAX initializes its devices
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.data * args.model)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    axes = dict(mesh=mesh, token_axes="data", vocab_axis="model")

    def spread(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    sharded, kernel = train(
        args,
        lambda *heads: jaxkl.distillation_loss(*heads, temperature=2.0, **axes),
        spread,
    )
    alone, _ = train(
        args,
        lambda *heads: jaxkl.distillation_loss(*heads, temperature=2.0),
        lambda x, spec: jax.device_put(x, jax.devices()[0]),
    )
    print(f"{mesh.size} {jax.devices()[0].platform} devices, mesh {dict(mesh.shape)}")
    part = kernel.addressable_shards[0].data.shape
    print(f"head {kernel.shape}, {part} on each device\n")
    print("step    loss, one device      loss, the mesh    differ by")
    for i, (x, y) in enumerate(zip(alone, sharded, strict=True)):
        print(f"{i + 1:4}{x:20.6f}{y:20.6f}{abs(y / x - 1):13.1e}")
    if not np.allclose(sharded, alone, rtol=1e-5):
        sys.exit("The losses are NOT the same.")
    print("\nThe losses are the same.")


if __name__ == "__main__":
    main()
