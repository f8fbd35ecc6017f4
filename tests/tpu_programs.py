"""What XLA's TPU compiler makes of sharded losses. No TPU: it compiles, nothing runs.

A program of its own, as libtpu wants its environment set before JAX starts. It prints
one line of JSON for each case.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import jaxkl


OPS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
SHARDED, PLAIN, LIST = "sharded", "plain jit", "a list as the teacher"
# These are sharded too. The last two have no teacher.
FUNCTION, MIXTURE, CONDITIONAL = "a function", "a mixture", "a list alone"
LABELS, TOKENS = "cross-entropy", "log-probabilities"
# Name: topology, devices over tokens and vocabulary, tokens, hidden (None: logits),
# vocabulary, tile, form. No two of a case's sizes are the same, on a device or in all.
CASES = {
    "heads 2x4": ("v5e:2x4", (2, 4), 2048, 512, 32768, 256, SHARDED),
    "heads 4x4": ("v5e:4x4", (4, 4), 4096, 384, 40960, 128, SHARDED),
    "logits 4x4": ("v5e:4x4", (4, 4), 4096, None, 40960, None, SHARDED),
    "labels 2x4": ("v5e:2x4", (2, 4), 2048, 512, 32768, 256, SHARDED),
    "plain jit 2x4": ("v5e:2x4", (2, 4), 2048, 512, 32768, 256, PLAIN),
    "plain jit 4x1": ("v5e:2x2", (4, 1), 8192, 640, 128256, None, PLAIN),
    "logits alone": ("v5e:2x2", (1, 1), 4096, None, 32768, None, PLAIN),
    "list alone": ("v5e:2x2", (1, 1), 32768, None, 40960, None, LIST),
    "function 2x2": ("v5e:2x2", (2, 2), 2048, 640, 24576, 256, FUNCTION),
    "mixture 2x2": ("v5e:2x2", (2, 2), 2048, 640, 24576, 256, MIXTURE),
    "conditional 2x2": ("v5e:2x2", (2, 2), 2048, 640, 24576, 256, CONDITIONAL),
    "labels 2x2": ("v5e:2x2", (2, 2), 2048, 640, 24576, 256, LABELS),
    "tokens 2x2": ("v5e:2x2", (2, 2), 2048, 640, 24576, 256, TOKENS),
    "large 4x4": ("v5e:4x4", (4, 4), 32768, 4096, 262144, None, SHARDED),
}


def compiled(name):
    topology, shape, tokens, hidden, vocab, tile, form = CASES[name]
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    devices = np.array(devices[: shape[0] * shape[1]]).reshape(shape)
    mesh = Mesh(devices, ("data", "model"))
    array = lambda dtype, shape, *spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, P(*spec))
    )
    if hidden is None:
        model = array("bfloat16", (tokens, vocab), "data", "model")
    else:
        model = jaxkl.LinearHead(
            array("bfloat16", (tokens, hidden), "data"),
            array("bfloat16", (hidden, vocab), None, "model"),
        )
    student = teacher = model
    if form == FUNCTION:
        params = dict(scale=array("bfloat16", (hidden,)), kernel=model.kernel)
        specs = dict(scale=P(), kernel=P(None, "model"))
        student = jaxkl.FunctionHead(normed, params, model.hidden, param_specs=specs)
    if form in (LIST, CONDITIONAL):
        columns = array("int32", (tokens, 64), "data")
        log_probs = array("float32", (tokens, 64), "data")
        tail = "bucket" if form == LIST else "conditional"
        teacher = jaxkl.SparseTeacher(columns, log_probs, tail=tail)
    labels = array("int32", (tokens,), "data")
    weight = array("float32", (tokens,), "data")
    axes = dict(mesh=mesh, token_axes="data", vocab_axis="model")

    def loss(student, teacher, labels, weight):
        more = dict(tile=tile) | ({} if form in (PLAIN, LIST) else axes)
        if form == LABELS:
            return jaxkl.cross_entropy(student, labels, **more)
        if form == TOKENS:
            of_tokens = jaxkl.token_log_probs(
                student, labels, with_entropy=True, **more
            )
            return jnp.mean(weight * of_tokens[0] + of_tokens[1])
        if name == "labels 2x4":
            more |= dict(labels=labels, alpha=0.5, label_smoothing=0.1, z_loss=1e-4)
        if form == MIXTURE:
            pairs = (weight, jaxkl.ForwardKL()), (1 - weight, jaxkl.JensenShannon())
            more |= dict(divergence=jaxkl.Mixture(pairs))
        return jaxkl.distillation_loss(student, teacher, temperature=2.0, **more)

    step = jax.jit(jax.value_and_grad(loss))
    return step.lower(student, teacher, labels, weight).compile()


def normed(params, x):
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return (x * params["scale"]) @ params["kernel"]


def collectives(text):
    """`[in a loop?, operation, sizes of its results]` of each in the program."""
    computations, name = {}, None
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?(%\S+) \(", line):
            name = start[1]
            computations[name] = []
        elif name:
            computations[name].append(line)
    in_loops = set(re.findall(r"body=(%[\w.-]+)", text))
    pending = list(in_loops)
    while pending:
        body = "\n".join(computations[pending.pop()])
        called = re.findall(r"(?:calls|to_apply|body|condition)=(%[\w.-]+)", body)
        new = set(called) - in_loops
        in_loops |= new
        pending += new
    found = []
    for name, lines in computations.items():
        for line in lines:
            # A layout may hold brackets and an equals sign, but no space.
            if match := re.search(rf" = (.*?) ({OPS})(?:-start)?\(", line):
                shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
                sizes = [[int(n) for n in x.split(",") if n] for x in shapes]
                found.append([name in in_loops, match[2], sizes])
    return found


if __name__ == "__main__":
    for name in CASES:
        program = compiled(name)
        memory = program.memory_analysis()
        temporary = memory.temp_size_in_bytes
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        facts = dict(
            collectives=collectives(program.as_text()),
            bytes=held + temporary,
            temporary=temporary,
        )
        print(json.dumps({name: facts}), flush=True)
