"""Defines a training step and an evaluation as pure functions of arrays."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxkl


# The mesh axis "model" shards the vocabulary and the width of each block's MLP.
SPECS = {
    "embedding": P("model", None),
    "kernel": P(None, "model"),
    "ffn_gate": P(None, None, "model"),
    "ffn_up": P(None, None, "model"),
    "ffn_down": P(None, "model", None),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Everything in a run that is not an array."""

    structure: Any  # structure of student and optimizer
    source: Any  # (frozen, batch, embedded tokens) -> the teacher in the loss
    divergence: Any
    temperature: Any  # a function of the step
    alpha: Any  # a function of the step
    mesh: Any  # None on one device


def online(structure):
    """Makes a source that runs the teacher during training."""

    def source(frozen, batch, x):
        hidden = nnx.merge(structure, frozen["teacher"])(x)
        return jaxkl.LinearHead(hidden, frozen["kernel"])

    return source


def recorded(frozen, batch, x):
    """Makes the teacher from the hidden states in the batch."""
    return jaxkl.LinearHead(batch["hidden"], frozen["kernel"])


def labels_alone(frozen, batch, x):
    """Makes a teacher that is certain of the label: the loss is the cross-entropy."""
    labels = batch["labels"][..., None]
    return jaxkl.SparseTeacher(labels, jnp.zeros(labels.shape))


def loss_with_metrics(task, student, frozen, batch, **kwargs):
    """Loss over the tokens of a batch, `[windows, length]`, that have a label."""
    x = frozen["embedding"][batch["tokens"]]
    axes = {}
    if task.mesh is not None:
        axes = dict(mesh=task.mesh, token_axes="data", vocab_axis="model")
    return jaxkl.distillation_loss_with_metrics(
        jaxkl.LinearHead(student(x), frozen["kernel"]),
        task.source(frozen, batch, x),
        labels=batch["labels"],
        where=batch["labels"] >= 0,
        **axes,
        **kwargs,
    )


def train_step(task, state, frozen, batches, step):
    """Sums the gradients of batches, `[batches, windows, length]`, and takes a step."""
    student, optimizer = nnx.merge(task.structure, state)
    structure, params = nnx.split(student)
    tokens = jnp.sum(batches["labels"] >= 0)

    def add(grads, batch):
        def loss_fn(params):
            return loss_with_metrics(
                task,
                nnx.merge(structure, params),
                frozen,
                batch,
                divergence=task.divergence,
                temperature=task.temperature(step),
                alpha=task.alpha(step),
                normalizer=tokens,  # all batches: their counts may differ
            )

        outputs, new = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return jax.tree.map(jnp.add, grads, new), outputs

    zero = jax.tree.map(jnp.zeros_like, params)
    grads, (losses, metrics) = jax.lax.scan(add, zero, batches)
    optimizer.update(student, grads)
    return nnx.state((student, optimizer)), means(metrics) | {"loss": losses.sum()}


def evaluate(task, state, frozen, batches):
    student, _ = nnx.merge(task.structure, state)
    task = dataclasses.replace(task, source=recorded)
    judge = lambda batch: loss_with_metrics(task, student, frozen, batch)[1]
    return means(jax.lax.map(judge, batches))


def means(metrics):
    """Means over all tokens, from the metrics of each batch."""
    total = jax.tree.map(lambda x: x.sum(0), metrics)
    names = "divergence", "kl", "cross_entropy", "top1_agreement"
    return {name: getattr(total, name) for name in names}


@partial(jax.jit, static_argnums=0)
def hidden_states(structure, state, embedding, tokens):
    """Computes hidden states for tokens `[batches, windows, length]`."""
    model = lambda tokens: nnx.merge(structure, state)(embedding[tokens])
    return jax.lax.map(model, tokens)


def spec(path, default):
    """Returns the sharding of the array at a path of a model, optimizer or batch."""
    names = (str(getattr(key, "key", getattr(key, "name", ""))) for key in path)
    return next((SPECS[name] for name in names if name in SPECS), default)
