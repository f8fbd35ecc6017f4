"""Measures a program as XLA compiles it: its memory, and its time on a TPU.

The devices need not exist. `compile_for_tpu` runs this module as a program, in the
environment that libtpu needs. The program takes the name of a TPU and a list of jobs as
JSON. It prints a line of JSON per job.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

from . import programs, schedule
from .harness import memory_of
from .hlo import reads
from .programs import Job


TPUS = {
    "v5e": "v5e:2x2",
    "v4": "v4:2x2x1",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


def compiled(job, devices=None, chip=None, folder=None):
    """Returns bytes on one device and compile seconds, or "error" if it does not fit.

    For a program of two arrays, it also returns how often the program reads each. On a
    mesh, it returns the compiled text. With a chip of `schedule.CHIPS`, and the folder
    that the compiler writes to, it returns the time by the compiler's schedule.
    """
    mesh, sharding = None, lambda *axes: None
    if job.mesh is not None:
        grid = np.array(devices[: np.prod(job.mesh)]).reshape(job.mesh)
        mesh = Mesh(grid, ("data", "model"))
        sharding = lambda *axes: NamedSharding(mesh, P(*axes))
    elif devices is not None:
        sharding = lambda *axes: SingleDeviceSharding(devices[0])
    f, arguments = programs.make(job, mesh)
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(*axes))
        for shape, dtype, axes in arguments
    ]
    for old in folder.glob("*.txt") if folder else ():
        old.unlink()
    start = time.perf_counter()
    try:
        program = jax.jit(f).lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"error": "does not fit in the device's memory"}
    facts = {"compile_s": time.perf_counter() - start} | memory_of(program)
    text = program.as_text()
    if mesh is not None:
        return facts | {"text": text}
    if len(args) == 2:
        facts["reads"] = reads(text)
    if chip is not None:
        facts |= schedule.summary(text, schedule.read_bundles(folder), chip)
    return facts


def compile_for_tpu(tpu, jobs):
    """Returns one dictionary per job, in order; raises ImportError without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("No module named 'libtpu'")
    with tempfile.TemporaryDirectory() as folder:
        flags = schedule.FLAGS.format(folder=folder) if tpu in schedule.CHIPS else ""
        environment = os.environ | {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_LOG_DIR": os.path.join(folder, "logs"),
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
        os.mkdir(environment["TPU_LOG_DIR"])
        text = json.dumps([dataclasses.asdict(job) for job in jobs])
        command = [sys.executable, "-m", __name__, tpu, text, folder]
        found = []
        with (
            open(os.path.join(folder, "stderr"), "w+", encoding="utf-8") as errors,
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
            ) as program,
        ):
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
    tpu, jobs, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    topology = TPUS.get(tpu, tpu)
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    chip = schedule.CHIPS.get(tpu)
    for job in jobs:
        try:
            facts = compiled(Job(**job), devices, chip, folder)
        except ImportError as error:  # of another library
            facts = {"error": str(error)}
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
