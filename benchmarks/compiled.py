"""Memory of a loss as XLA compiles it for devices that need not be there.

As a program it is the part that needs libtpu and its environment, set by `tpu_memory`:
jobs as JSON in its first argument, one line of JSON for each of them on its output.
"""

import dataclasses
import functools as ft
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

import jaxkl

from . import losses


TPUS = {
    "v5e": "v5e:2x2",
    "v4": "v4:2x2x1",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """Value and gradient by the student's arrays, T = 2."""

    implementation: str  # "jaxkl", "plain JAX"; "jaxkl, jit": the partitioner's way
    tokens: int
    vocab: int
    hidden: int | None = None  # None: from logits
    dtype: str = "bfloat16"
    divergence: str = "forward-kl"
    mesh: Sequence[int] | None = None  # devices for tokens, for columns; None: one


def compiled_memory(job, devices=None):
    """Bytes, and the seconds that compiling took; "error" if it does not fit.

    Bytes are those of one device. On a mesh, also the compiled text.
    """
    ours = job.implementation != "plain JAX"
    loss = (losses.with_jaxkl if ours else losses.with_plain_jax)(job.divergence)
    mesh, sharding = None, lambda *axes: None
    if job.mesh is not None:
        grid = np.array(devices[: np.prod(job.mesh)]).reshape(job.mesh)
        mesh = Mesh(grid, ("data", "model"))
        sharding = lambda *axes: NamedSharding(mesh, P(*axes))
        if job.implementation == "jaxkl":
            loss = _on(mesh, job.divergence)
    elif devices is not None:
        sharding = lambda *axes: SingleDeviceSharding(devices[0])
    if job.hidden is None:
        f, shapes = loss, [((job.tokens, job.vocab), ("data", "model"))] * 2
    else:

        def f(h, k, th, tk):
            if ours:
                return loss(jaxkl.LinearHead(h, k), jaxkl.LinearHead(th, tk))
            return loss(h @ k, th @ tk)

        shapes = [
            ((job.tokens, job.hidden), ("data",)),
            ((job.hidden, job.vocab), (None, "model")),
        ] * 2
    args = [
        jax.ShapeDtypeStruct(shape, job.dtype, sharding=sharding(*axes))
        for shape, axes in shapes
    ]
    student = tuple(range(len(shapes) // 2))
    start = time.perf_counter()
    try:
        compiled = jax.jit(jax.value_and_grad(f, student)).lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"error": "does not fit in the device's memory"}
    memory = compiled.memory_analysis()
    facts = {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "compile_s": time.perf_counter() - start,
    }
    if mesh is not None:
        return facts | {"text": compiled.as_text()}
    return facts if job.hidden else facts | {"reads": reads(compiled.as_text())}


def reads(text):
    """How many operations of a compiled program take each of its arguments, in order.

    Each is one pass over the argument: what fuses is one operation.
    """
    entry = text[text.index("\nENTRY ") :].splitlines()[2:]
    lines = [line.partition(" = ") for line in entry if " = " in line]
    source = {}  # of an argument, or what is the same in memory: its number
    counts = {}
    for name, _, rest in lines:
        name = name.replace("ROOT", "").strip().lstrip("%")
        # A layout has parentheses too, but no names in them.
        operation = re.search(r"parameter\((\d+)\)|([\w-]+)\((%[^)]*)\)", rest)
        if operation is None:
            continue
        number, kind, operands = operation.groups()
        if number is not None:
            source[name] = int(number)
            counts[int(number)] = 0
            continue
        used = {source[x] for x in re.findall(r"%([\w.-]+)", operands) if x in source}
        if kind == "bitcast":
            if used:
                (source[name],) = used
            continue
        for i in used:
            counts[i] += 1
    return [counts[i] for i in sorted(counts)]


def _on(mesh, divergence):
    return ft.partial(
        jaxkl.sharded_distillation_loss,
        divergence=losses.DIVERGENCES[divergence],
        temperature=losses.T,
        mesh=mesh,
        token_axes="data",
        vocab_axis="model",
    )


def tpu_memory(tpu, jobs):
    """One dictionary per job, in their order; ImportError if libtpu is not there."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("No module named 'libtpu'")
    topology = TPUS.get(tpu, tpu)
    with tempfile.TemporaryDirectory() as logs:
        environment = os.environ | {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_LOG_DIR": logs,
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
        text = json.dumps([dataclasses.asdict(job) for job in jobs])
        with open(os.path.join(logs, "stderr"), "w+", encoding="utf-8") as errors:
            program = subprocess.Popen(
                [sys.executable, "-m", __name__, topology, text],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
            )
            found = []
            for line in program.stdout:
                if line.startswith("{"):
                    found.append(json.loads(line))
                    done = f"{tpu}: compiled {len(found)} of {len(jobs)}"
                    print(done, file=sys.stderr, flush=True)
            if program.wait():
                errors.seek(0)
                reason = errors.read().strip() or "no message"
                raise RuntimeError(reason.splitlines()[-1])
    return found


def main():
    topology, jobs = sys.argv[1], [Job(**job) for job in json.loads(sys.argv[2])]
    description = topologies.get_topology_desc(topology, platform="tpu")
    for job in jobs:
        print(json.dumps(compiled_memory(job, description.devices)), flush=True)


if __name__ == "__main__":
    main()
