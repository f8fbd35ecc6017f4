# `make run ARGS="examples/keras_distiller.py"` builds an environment and runs this.
"""Distils a language model in Keras's own `Distiller`, from hidden states.

A `DistillationLoss` gives hidden states and heads to jaxkl, and leaves out padding.
Without padding its losses are those of `LogitsDistillation`, in less memory.
"""

import argparse
import os
import sys


os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import jax
import keras
import numpy as np

import jaxkl


class Hidden(keras.layers.Layer):
    """Names what the loss reads: the head's input, and which tokens count."""

    def call(self, hidden, tokens):
        return hidden, tokens != 0


class HeadDistillation(keras.distillation.DistillationLoss):
    """Compares the heads of both models, from the outputs of their layers `Hidden`."""

    teacher_layer_name = student_layer_name = "hidden"

    def __init__(self, student, teacher):
        self.student_head = student.get_layer("head")
        self.teacher_head = teacher.get_layer("head")

    def compute_loss(self, teacher_outputs, student_outputs, **kwargs):
        hidden, where = student_outputs
        teacher_hidden, _ = teacher_outputs
        return jaxkl.distillation_loss(
            jaxkl.LinearHead(hidden, self.student_head.kernel.value),
            jaxkl.LinearHead(teacher_hidden, self.teacher_head.kernel.value),
            temperature=3.0,
            where=where,
            tile=64,  # tokens at a time
        )


def language_model(vocab, length, width):
    tokens = keras.Input((length,), dtype="int32")
    normal = keras.initializers.RandomNormal(stddev=1.0)
    x = keras.layers.Embedding(vocab, width, embeddings_initializer=normal)(tokens)
    x = x + keras.layers.Dense(width, activation="gelu")(x)
    hidden, _ = Hidden(name="hidden")(x, tokens)
    options = dict(use_bias=False, kernel_initializer="lecun_normal", name="head")
    return keras.Model(tokens, keras.layers.Dense(vocab, **options)(hidden))


def make_distiller(name, vocab, length):
    keras.utils.set_random_seed(0)
    teacher = language_model(vocab, length, 64)
    student = language_model(vocab, length, 32)
    if name == "LogitsDistillation":
        kl = keras.losses.KLDivergence()
        loss = keras.distillation.LogitsDistillation(temperature=3.0, loss=kl)
    else:
        loss = HeadDistillation(student, teacher)
    # With more weight on the student's own loss, Keras would make its logits.
    distiller = keras.distillation.Distiller(
        teacher, student, loss, student_loss_weight=0.0
    )
    labels = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller.compile(optimizer=keras.optimizers.Adam(1e-2), loss=labels)
    return distiller


def train(distiller, tokens, steps):
    """Returns the loss of each step, all on one batch."""
    fit = distiller.fit(tokens, batch_size=len(tokens), epochs=steps, verbose=0)
    return np.array(fit.history["total_loss"])


def memory(distiller, tokens):
    """Returns the temporary memory of a step, in MiB, after `train`."""
    variables = (
        distiller.trainable_variables,
        distiller.non_trainable_variables,
        distiller.optimizer.variables,
        distiller.metrics_variables,
    )
    state = [[variable.value for variable in group] for group in variables]
    compiled = jax.jit(distiller.train_step).lower(state, (tokens,)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"vocab": 16384, "batch": 4, "length": 128, "steps": 5}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", default=size, type=int, help=f"{size}")
    args = parser.parse_args()
    shape = args.batch, args.length
    tokens = np.random.default_rng(0).integers(1, args.vocab, shape, np.int32)

    losses = {}
    for name in "LogitsDistillation", "HeadDistillation":
        distiller = make_distiller(name, args.vocab, args.length)
        losses[name] = train(distiller, tokens, args.steps)
        temp = memory(distiller, tokens)
        print(f"{name:18}{temp:7.1f} MiB of temporary memory a step")
        print("  loss", *(f"{x:9.6f}" for x in losses[name]))
    off = np.max(np.abs(losses["HeadDistillation"] / losses["LogitsDistillation"] - 1))
    print(f"Without padding the losses differ by {off:.1e}.")

    lengths = args.length // np.arange(1, args.batch + 1)
    padded = np.where(np.arange(args.length) < lengths[:, None], tokens, 0)
    distiller = make_distiller("HeadDistillation", args.vocab, args.length)
    print(f"HeadDistillation, {np.mean(padded == 0):.0%} of the tokens are padding")
    print("  loss", *(f"{x:9.6f}" for x in train(distiller, padded, args.steps)))
    if not off < 1e-5:
        sys.exit("The losses are NOT the same.")


if __name__ == "__main__":
    main()
