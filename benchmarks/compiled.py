"""Measures the memory of a loss as XLA compiles it; the devices need not exist.

`tpu_memory` runs this module as a program, in the environment that libtpu needs. The
program takes a topology and a list of jobs as JSON. It prints a line of JSON per job.
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
    """A loss to compile: value and gradient by the student's arrays, T = 2."""

    implementation: str  # "jaxkl", "plain JAX" or "jaxkl, jit" (partitioned by XLA)
    tokens: int
    vocab: int
    hidden: int | None = None  # None: the loss takes logits
    dtype: str = "bfloat16"
    divergence: str = "forward-kl"
    mesh: Sequence[int] | None = None  # devices for tokens and for columns


def compiled_memory(job, devices=None):
    """Returns bytes on one device and compile seconds, or "error" if it does not fit.

    On a mesh, also returns the compiled text.
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
    """Counts the operations of a compiled program that take each argument, in order.

    Each operation is one pass over the argument. A fusion is one operation.
    """
    entry = text[text.index("\nENTRY ") :].splitlines()[2:]
    lines = [line.partition(" = ") for line in entry if " = " in line]
    source = {}  # names of arguments and their bitcasts -> argument number
    counts = {}
    for name, _, rest in lines:
        name = name.replace("ROOT", "").strip().lstrip("%")
        # A layout also has parentheses, but without names.
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
        jaxkl.distillation_loss,
        divergence=losses.DIVERGENCES[divergence],
        temperature=losses.T,
        mesh=mesh,
        token_axes="data",
        vocab_axis="model",
    )


def tpu_memory(tpu, jobs):
    """Returns one dictionary per job, in order; raises ImportError without libtpu."""
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
