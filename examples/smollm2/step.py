"""Defines a training step and an evaluation as pure functions of arrays."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxkl
from sample import own_text


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
    teacher: Any  # structure of the teacher
    loss: Any  # (task, student, frozen, batch, step, normalizer) -> loss and metrics
    source: Any  # (frozen, batch, embedded tokens) -> the teacher in the loss
    divergence: Any
    temperature: Any  # a function of the step
    alpha: Any  # a function of the step
    mesh: Any  # None on one device
    prompt_length: int | None  # of the student's own text, if there is any
    end: int  # the token that ends a text

    @property
    def axes(self):
        if self.mesh is None:
            return {}
        return dict(mesh=self.mesh, token_axes="data", vocab_axis="model")


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
    return jaxkl.SparseTeacher(labels, jnp.zeros(labels.shape), tail="renormalize")


def models(task, student, frozen, batch):
    x = frozen["embedding"][batch["tokens"]]
    head = jaxkl.LinearHead(student(x), frozen["kernel"])
    return head, task.source(frozen, batch, x)


def loss_with_metrics(task, student, frozen, batch, **kwargs):
    """Loss over the tokens of a batch, `[windows, length]`, that have a label."""
    return jaxkl.distillation_loss_with_metrics(
        *models(task, student, frozen, batch),
        labels=batch["labels"],
        where=batch["labels"] >= 0,
        **task.axes,
        **kwargs,
    )


def divergence_loss(task, student, frozen, batch, step, normalizer):
    return loss_with_metrics(
        task,
        student,
        frozen,
        batch,
        divergence=task.divergence,
        temperature=task.temperature(step),
        alpha=task.alpha(step),
        normalizer=normalizer,
    )


def policy_loss(task, student, frozen, batch, step, normalizer):
    """The mean of `log q - log p` at the labels, which the student has drawn.

    It estimates KL(student ‖ teacher), and its gradient that KL's gradient at these
    places: the ratio is 1, with the gradient of `log q`. It has no metrics.
    """
    where = batch["labels"] >= 0
    log_q, log_p = (
        jaxkl.token_log_probs(x, batch["labels"], where=where, **task.axes)
        for x in models(task, student, frozen, batch)
    )
    reward = jax.lax.stop_gradient(log_p - log_q)
    ratio = jnp.exp(log_q - jax.lax.stop_gradient(log_q))
    return -jnp.sum(ratio * reward) / normalizer, None


def train_step(task, state, frozen, batches, step):
    """Sums the gradients of batches, `[batches, windows, length]`, and takes a step."""
    student, optimizer = nnx.merge(task.structure, state)
    structure, params = nnx.split(student)
    tokens = jnp.sum(batches["labels"] >= 0)

    def add(grads, batch):
        def loss_fn(params):
            # The tokens of all batches: their counts may differ.
            model = nnx.merge(structure, params)
            return task.loss(task, model, frozen, batch, step, tokens)

        outputs, new = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return jax.tree.map(jnp.add, grads, new), outputs

    zero = jax.tree.map(jnp.zeros_like, params)
    grads, (losses, metrics) = jax.lax.scan(add, zero, batches)
    optimizer.update(student, grads)
    metrics = means(metrics) if metrics else {}
    metrics |= {"loss": losses.sum(), "tokens": tokens}
    return nnx.state((student, optimizer)), metrics


def student_text(task, state, frozen, batches, key, temperature=1.0):
    """Batches of the student's own text after the prompts of `batches`."""
    student, _ = nnx.merge(task.structure, state)
    where = task.prompt_length, task.end
    return own_text(student, frozen["embedding"], batches, *where, key, temperature)


def evaluate(task, state, frozen, batches):
    """Means over batches, and KL(student ‖ teacher) on own text if there is any."""
    student, _ = nnx.merge(task.structure, state)

    def judge(source, batches, **kwargs):
        by = dataclasses.replace(task, source=source)
        of = lambda batch: loss_with_metrics(by, student, frozen, batch, **kwargs)[1]
        return means(jax.lax.map(of, batches))

    found = judge(recorded, batches)
    if task.prompt_length is None:
        return found
    own = student_text(task, state, frozen, batches, jax.random.key(0))
    on_own = judge(online(task.teacher), own, divergence=jaxkl.ReverseKL())
    return found | {"own_kl": on_own["divergence"]}


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
