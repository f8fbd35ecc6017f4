# `make run ARGS="examples/multihost.py"` builds an environment and runs this.
"""Distils a language model's head over the devices of several processes.

The same code runs as one process, as several on this machine, or on many machines, with
the same losses. Tokens are sharded over the mesh axis "data" and the vocabulary over
"model". Every process makes only its own rows of each batch.

Run one process on the devices that it finds, or on virtual CPU devices:

    python examples/multihost.py
    python examples/multihost.py --devices-per-process 8

Run two processes of four CPU devices each on this machine, over loopback. The second
command kills one of them: the job must then fail soon, and not hang:

    python examples/multihost.py --launch 2
    python examples/multihost.py --launch 2 --die-at 2

On TPU pods, Slurm, Open MPI and Kubernetes, start it on each machine without options:
JAX finds the other machines. Elsewhere, pass the address of the first one:

    python examples/multihost.py --coordinator HOST:PORT --processes 2 --process 0
    python examples/multihost.py --coordinator HOST:PORT --processes 2 --process 1
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import traceback
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxkl


# Seconds that JAX waits for another process to join, to send a heartbeat, and to end.
# After that it ends this process too, with a message.
START, HEARTBEAT, SHUTDOWN = 60, 10, 30
GRACE = 2 * HEARTBEAT  # the launcher's wait for the others' messages

SPECS = {"embed": P(), "mix": P(), "kernel": P(None, "model")}


def init(key, vocab, width):
    keys = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(keys[0], (vocab, width)),
        "mix": jax.random.normal(keys[1], (width, width)) / width**0.5,
        "kernel": jax.random.normal(keys[2], (width, vocab)) / width**0.5,
    }


def head(params, tokens):
    x = params["embed"][tokens]
    return jaxkl.LinearHead(x + jnp.tanh(x @ params["mix"]), params["kernel"])


def own_rows(args, step, sharding):
    """Returns this process's rows of a batch, `[rows, length]`: tokens and mask.

    A row depends only on its number, not on the process that makes it.
    """
    indices = sharding.addressable_devices_indices_map((args.batch, args.length))
    rows = {row for rows, _ in indices.values() for row in range(args.batch)[rows]}
    rngs = [np.random.default_rng((step, row)) for row in sorted(rows)]
    tokens = [rng.integers(args.vocab, size=args.length) for rng in rngs]
    lengths = [rng.integers(1, args.length + 1) for rng in rngs]
    where = np.arange(args.length) < np.array(lengths)[:, None]
    return np.array(tokens, np.int32), where


def train(args):
    devices = jax.device_count()
    model = args.model or (2 if devices % 2 == 0 else 1)
    if devices % model or args.batch % (devices // model) or args.vocab % model:
        sys.exit(
            f"--model {model} must divide the {devices} devices and --vocab "
            f"{args.vocab}; the other {devices / model:g} must divide --batch "
            f"{args.batch}."
        )
    # JAX's newer default, Explicit, would require a sharding for each operation.
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((devices // model, model), ("data", "model"), axis_types=auto)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    by_row = NamedSharding(mesh, P("data"))

    def loss_fn(student, teacher, tokens, where):
        return jaxkl.distillation_loss(
            head(student, tokens),
            head(teacher, tokens),
            mesh=mesh,
            token_axes="data",
            vocab_axis="model",
            temperature=2.0,
            where=where,  # the mean is over the tokens that count in all processes
        )

    def step(student, *batch):
        loss, grads = jax.value_and_grad(loss_fn)(student, *batch)
        return jax.tree.map(jnp.subtract, student, grads), loss

    step = jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
    # Under `jit`, each device makes only its own part of the parameters.
    start = jax.jit(init, static_argnums=(1, 2), out_shardings=shardings)
    student = start(jax.random.key(0), args.vocab, 32)
    teacher = start(jax.random.key(1), args.vocab, 64)

    first, processes = jax.process_index() == 0, jax.process_count()
    if first:
        each = f"{jax.local_device_count()} {jax.devices()[0].platform} devices"
        print(
            f"processes: {processes} with {each}; mesh: {dict(mesh.shape)}", flush=True
        )
    for i in range(1, args.steps + 1):
        if i == args.die_at and jax.process_index() == processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = jax.make_array_from_process_local_data(
            by_row, own_rows(args, i, by_row)
        )
        student, loss = step(student, teacher, *batch)
        loss = float(loss)  # waits for all processes
        if first:
            print(f"step {i:3}   loss {loss:.5f}", flush=True)
    if first:
        print(f"final loss {loss:.5f}", flush=True)


def join(args):
    if args.devices_per_process:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices_per_process)
    # By default JAX multiplies float32 matrices in lower precision on a GPU or TPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    if args.coordinator:
        who = f"process {args.process} of {args.processes}"
        print(f"{who} joins at {args.coordinator}, within {START} s", flush=True)
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            initialization_timeout=START,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except ValueError as error:
        # Without options, and without a cluster that JAX knows, there is one process.
        if "coordinator_address" not in str(error):
            raise


def run(args):
    join(args)
    try:
        return train(args)
    except jax.errors.JaxRuntimeError as error:
        print(
            f"Process {jax.process_index()} stops: {error}\nIf a connection is lost, "
            "another process died before: see why in its output, and start all again.",
            file=sys.stderr,
        )
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # sys.exit would wait for the other processes, even dead ones


def follow(i, child):
    with child.stdout:
        for line in child.stdout:
            if "connected peer ranks is" not in line:  # Gloo prints it for every group
                sys.stdout.write(f"[{i}] {line}")
                sys.stdout.flush()
    return child.wait()


def launch(args):
    """Runs all processes of the job here. If one fails, kills the others and exits."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # gRPC would use a proxy even for 127.0.0.1, and JAX would listen on all interfaces.
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env["JAX_COORDINATOR_BIND_ADDRESS"] = address
    options = ["--launch=0", f"--coordinator={address}", f"--processes={args.launch}"]
    options += [f"--devices-per-process={args.devices_per_process or 4}"]
    command = [sys.executable, "-u", __file__, *sys.argv[1:], *options]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    children, jobs = [], {}
    with futures.ThreadPoolExecutor(args.launch) as pool:
        try:
            for i in range(args.launch):
                own = [*command, f"--process={i}"]
                children.append(subprocess.Popen(own, env=env, **pipe))
                jobs[pool.submit(follow, i, children[i])] = i
            for job in futures.as_completed(jobs):
                if status := job.result():
                    break
            else:
                return
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            print(
                f"Process {jobs[job]} died first ({how}). The others cannot go on and "
                f"end within {GRACE} s. Its lines, [{jobs[job]}], may say why; after "
                "that, start all again.",
                file=sys.stderr,
                flush=True,
            )
            futures.wait(jobs, timeout=GRACE)
            sys.exit(1)
        finally:
            for child in children:
                child.kill()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--launch", type=int, default=0, help="number of processes to start here")
    add("--devices-per-process", type=int, help="number of virtual CPU devices")
    add("--coordinator", help="HOST:PORT of process 0")
    add("--processes", type=int, help="number of processes")
    add("--process", type=int, help="index of this process, from 0")
    add("--model", type=int, help="size of the mesh axis for the vocabulary")
    add("--steps", type=int, default=10)
    add("--batch", type=int, default=16)
    add("--length", type=int, default=32)
    add("--vocab", type=int, default=1000)
    add("--die-at", type=int, help="kill the last process at this step")
    args = parser.parse_args()
    told = {x is not None for x in (args.coordinator, args.processes, args.process)}
    if len(told) == 2:
        parser.error("--coordinator, --processes and --process go together")
    (launch if args.launch else run)(args)


if __name__ == "__main__":
    main()
