# `make run ARGS="examples/tunix_trainer.py"` builds an environment and runs this.
"""Distils a language model in tunix's own trainer, from hidden states.

A strategy of ten lines gives hidden states and heads to jaxkl, and leaves out padding.
Without padding its losses are those of tunix's `LogitStrategy`, in less memory.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation.distillation_trainer import (
    DistillationTrainer,
    TrainingConfig,
    TrainingInput,
)
from tunix.distillation.strategies import BaseStrategy, LogitStrategy

import jaxkl


class HeadStrategy(BaseStrategy):
    """Takes heads for outputs, and integers for labels: -100 is padding."""

    def compute_loss(self, student_output, teacher_output, labels):
        return jaxkl.distillation_loss_with_metrics(
            student_output,
            teacher_output,
            temperature=2.0,
            labels=labels,
            alpha=0.5,
            where=labels != -100,
            tile=64,  # tokens at a time
        )

    def compute_eval_loss(self, student_output, labels):
        return jaxkl.cross_entropy(student_output, labels, where=labels != -100), {}


class Trainer(DistillationTrainer):
    """Logs the metrics of the strategy, which tunix 0.1.7 drops."""

    def _post_process_train_step(self, aux):
        logged = self._buffered_train_metrics.additional_metrics
        if isinstance(aux, jaxkl.DistillationMetrics):
            parts, _ = logged.setdefault("kl", ([], lambda x: np.float32(sum(x).kl)))
            parts.append(aux)


class Decoder(nnx.Module):
    """Maps tokens, `[batch, length]`, to the head that reads the next token."""

    def __init__(self, vocab, width, rngs):
        normal = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(vocab, width, embedding_init=normal, rngs=rngs)
        self.layer = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens[:, :-1])
        return jaxkl.LinearHead(x + nnx.gelu(self.layer(x)), self.head.kernel[...])


def make_strategy(name, vocab):
    def head(model, input_tokens, input_mask):
        return model(input_tokens)

    def logits(model, input_tokens, input_mask):
        head = model(input_tokens)
        return head.hidden @ head.kernel

    def labels(input_tokens, input_mask):
        return jnp.where(input_mask[:, 1:], input_tokens[:, 1:], -100)

    def one_hot(input_tokens, input_mask):
        return jax.nn.one_hot(input_tokens[:, 1:], vocab)  # padding counts

    if name == "LogitStrategy":
        return LogitStrategy(logits, logits, one_hot, temperature=2.0, alpha=0.5)
    return HeadStrategy(head, head, labels)


def make_trainer(name, vocab):
    student, teacher = Decoder(vocab, 32, nnx.Rngs(0)), Decoder(vocab, 64, nnx.Rngs(1))
    config = TrainingConfig(eval_every_n_steps=1)
    strategy = make_strategy(name, vocab)
    return Trainer(student, teacher, strategy, optax.adam(1e-2), config)


def memory(trainer, batch):
    """Returns the temporary memory of the trainer's step, in MiB."""
    inputs = trainer._prepare_inputs(batch)  # with the teacher's outputs
    step = nnx.jit(trainer.create_train_step_fn(), donate_argnames="optimizer")
    compiled = step.lower(trainer.model, trainer.optimizer, inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def history(trainer, name):
    return trainer.metrics_logger.get_metric_history("", name, "train")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"vocab": 16384, "batch": 4, "length": 129, "steps": 5}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", default=size, type=int, help=f"{size}")
    args = parser.parse_args()
    shape = args.batch, args.length
    tokens = np.random.default_rng(0).integers(0, args.vocab, shape, np.int32)
    whole = TrainingInput(input_tokens=tokens, input_mask=np.ones(shape, bool))

    losses = {}
    for name in "LogitStrategy", "HeadStrategy":
        trainer = make_trainer(name, args.vocab)
        print(f"{name:14}{memory(trainer, whole):7.1f} MiB of temporary memory a step")
        trainer.train([whole] * args.steps)
        losses[name] = history(trainer, "loss")
        print("  loss         ", *(f"{x:9.6f}" for x in losses[name]))
    print("  KL to teacher", *(f"{x:9.6f}" for x in history(trainer, "kl")))
    off = np.max(np.abs(losses["HeadStrategy"] / losses["LogitStrategy"] - 1))
    print(f"Without padding the losses differ by {off:.1e}.")

    lengths = args.length // np.arange(1, args.batch + 1)
    mask = np.arange(args.length) < lengths[:, None]
    trainer = make_trainer("HeadStrategy", args.vocab)
    trainer.train([TrainingInput(input_tokens=tokens, input_mask=mask)] * args.steps)
    print(f"HeadStrategy, {1 - mask.mean():.0%} of the tokens are padding")
    print("  loss         ", *(f"{x:9.6f}" for x in history(trainer, "loss")))
    print("  KL to teacher", *(f"{x:9.6f}" for x in history(trainer, "kl")))
    if not off < 1e-5:
        sys.exit("The losses are NOT the same.")


if __name__ == "__main__":
    main()
