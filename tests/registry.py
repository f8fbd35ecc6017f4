"""Every loss on random arrays, beside its oracle: the rows of the tests by property.

A loss has all its arguments at once: a temperature, a weight, a mask and a label for
each token. A test of a property takes it from here, and `check` compares its value and
every gradient with the oracle's.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference
from jaxkl import FunctionHead, LinearHead, SparseTeacher

from .cases import ALL, assert_gradient, assert_source_gradient
from .helpers import assert_close
from .moving import MOVING
from .sources import (
    expected_cross_entropy,
    expected_log_probs,
    expected_of,
    make_models,
    per_token,
    TAILS,
)


class Batch(NamedTuple):
    """The arguments that are arrays: those that have a gradient, and the others."""

    floats: dict[str, Any]
    others: dict[str, Any]

    @property
    def shape(self):
        return self.others["where"].shape

    def move(self, *names):
        """These arguments become constants."""
        moved = {name: self.floats[name] for name in names if name in self.floats}
        floats = {k: v for k, v in self.floats.items() if k not in moved}
        return Batch(floats, self.others | moved)

    def map(self, f, *names):
        """`f` of these arguments, or of all."""
        of = lambda x: {k: f(v) if k in names or not names else v for k, v in x.items()}
        return Batch(of(self.floats), of(self.others))


ABSENT = {"labels": -100, "tokens": -1}


@dataclass(frozen=True)
class Loss:
    """A public function, the sources of its models, and what it is given besides."""

    source: str
    function: str = "distillation_loss"
    divergence: str = "forward"  # or "moving js", whose parameter is an array
    places: tuple[int, ...] = ()  # of `tokens`, beside those of a token

    @property
    def is_listed(self):
        return self.source.rpartition(", ")[2] in TAILS

    @property
    def is_moving(self):
        return self.divergence.startswith("moving ")

    @property
    def moving(self):
        return MOVING[self.divergence.removeprefix("moving ")]

    @property
    def options(self):
        """The arguments that are no arrays."""
        if self.function == "token_log_probs":
            return dict(with_entropy=True)
        smoothing = dict(label_smoothing=0.2, z_loss=0.01)
        if self.function == "cross_entropy":
            return smoothing
        divergence = {} if self.is_moving else dict(divergence=ALL[self.divergence][0])
        teacher = {} if self.is_listed else dict(differentiate_teacher=True)
        return dict(alpha=0.6) | smoothing | divergence | teacher

    def make(self, rng, shape, vocab, dtype="float32", *, pad=0, **settings):
        """A batch of tokens of this shape; the models have `pad` columns more, and the
        teacher one more again, unless `pad` holds a number for each."""
        pads = dict(pad=pad if isinstance(pad, tuple) else (pad, pad and pad + 1))
        student, teacher = make_models(
            rng, self.source, shape, vocab, dtype, **pads, **settings
        )
        arrays = per_token(
            rng, shape, "temperature", "weights", "where", "labels", vocab=vocab
        )
        where, labels = arrays.pop("where"), arrays.pop("labels")
        if self.function == "cross_entropy":
            floats = dict(student=student, weights=arrays["weights"])
            return Batch(floats, dict(where=where, labels=labels))
        if self.function == "token_log_probs":
            tokens = jnp.asarray(rng.integers(-1, vocab, (*shape, *self.places)))
            floats = dict(student=student, temperature=arrays["temperature"])
            return Batch(floats, dict(where=where, tokens=tokens))
        floats, others = (
            dict(student=student, **arrays),
            dict(where=where, labels=labels),
        )
        if self.is_moving:
            others["divergence"] = self.moving.over(shape, dtype=dtype)[0]
        if self.is_listed:
            return Batch(floats, others | dict(teacher=teacher))
        more = dict(teacher=teacher, teacher_temperature=jnp.float32(1.5))
        return Batch(floats | more, others)

    def __call__(self, batch, *, module=jaxkl, f=None, **options):
        """The loss, or another function `f` of the same arguments."""
        f = f or getattr(module, self.function)
        return f(**batch.floats, **batch.others, **self.options | options)

    def expected(self, batch, cotangent, *, vocab_size=None, reduction="mean", **more):
        """What the oracle finds: the values as a list, and gradients by name."""
        arguments = batch.floats | batch.others
        if self.function == "token_log_probs":
            tokens = np.asarray(arguments.pop("tokens"))
            slots = tokens.reshape(*batch.shape, -1)
            g = cotangent[0].reshape(slots.shape), cotangent[1]
            found = expected_log_probs(
                **arguments, tokens=slots, vocab_size=vocab_size, cotangents=g
            )
            return [found.log_probs.reshape(tokens.shape), found.entropy], found
        more |= dict(reduction=reduction, cotangent=cotangent, vocab_size=vocab_size)
        more |= dict(label_smoothing=0.2, z_loss=0.01)
        if self.function == "cross_entropy":
            found = expected_cross_entropy(**arguments, **more)
        else:
            more |= (
                dict(alpha=0.6, divergence=ALL[self.divergence][1])
                if not self.is_moving
                else dict(alpha=0.6)
            )
            if self.is_moving:
                where = np.asarray(arguments["where"])
                dtype = jax.tree.leaves(arguments.pop("divergence"))[0].dtype
                of = self.moving.over(batch.shape, where, dtype)
                more["divergence"] = of[1]
            found = expected_of(**arguments, **more)
        return [found.loss], found

    def cotangent(self, rng, batch, **options):
        """One for each number that the loss is."""
        shapes = jax.eval_shape(lambda batch: self(batch, **options), batch)
        draw = lambda x: np.asarray(rng.normal(size=x.shape), np.float32)
        return jax.tree.map(draw, shapes)

    def tolerances(self, batch):
        """Of values and gradients, to the largest entry."""
        dtypes = {x.dtype for x in jax.tree.leaves(batch.floats)}
        if jnp.dtype("float64") in dtypes:
            return 1e-12, 1e-11
        arguments = batch.floats | batch.others
        sources = [arguments["student"], arguments.get("teacher")]
        half = {"bfloat16": 1e-2, "float16": 1e-3}
        worst = max(half.get(str(dtype), 0.0) for dtype in dtypes)
        if any(isinstance(x, FunctionHead) for x in sources):  # it rounds as it likes
            return (3 * worst, 3 * worst) if worst else (5e-6, 2e-5)
        dense = all(isinstance(x, jax.Array) for x in sources) and not self.is_moving
        return (1e-6 if dense and not worst else 1e-5 if worst else 5e-6), worst or 1e-5


def pull_back(f, batch, cotangent):
    """`f(batch)`, and the cotangent pulled back to its floats, in one program."""

    @jax.jit
    def run(floats, others, cotangent):
        value, vjp = jax.vjp(lambda floats: f(Batch(floats, others)), floats)
        like = jax.tree.map(lambda g, x: g.astype(x.dtype), cotangent, value)
        return value, vjp(like)[0]

    return run(*batch, cotangent)


def check(loss, rng, batch, *, f=None, exact=None, tol=None, run=None, **options):
    """Compares value and gradients with the oracle's, and returns them.

    `exact` is the batch that the oracle takes, where it differs from that of the loss;
    `run` stands for `pull_back`. The options `reduction`, `vocab_size` and `normalizer`
    are the oracle's too.
    """
    cotangent = loss.cotangent(rng, batch, **options)
    of = lambda batch: loss(batch, f=f, **options)
    value, gradients = (run or pull_back)(of, batch, cotangent)
    theirs = ("reduction", "vocab_size", "normalizer")
    shared = {name: options[name] for name in theirs if name in options}
    expected = loss.expected(exact or batch, cotangent, **shared)
    assert_expected(
        loss, batch, value, gradients, expected, tol=tol, cotangent=cotangent
    )
    return value, gradients


def assert_expected(
    loss, batch, value, gradients, expected, *, tol=None, cotangent=1.0
):
    values, wanted = expected
    value_tol, gradient_tol = tol or loss.tolerances(batch)
    is_double = any(x.dtype == jnp.float64 for x in jax.tree.leaves(batch.floats))
    for x, want in zip(jax.tree.leaves(value), values, strict=True):
        assert x.dtype == (jnp.float64 if is_double else jnp.float32)
        assert x.shape == np.shape(want)
        assert_close(x, want, value_tol, "value")
    assert gradients.keys() == batch.floats.keys()
    for name, x in batch.floats.items():
        grad, want = gradients[name], getattr(wanted, name)
        if name in ("student", "teacher"):
            tiny = isinstance(x, jax.Array)
            assert_source_gradient(x, grad, want, name, gradient_tol, is_double, tiny)
            continue
        assert grad.dtype == x.dtype and grad.shape == x.shape, name
        # What is computed in float64 is rounded once.
        of = 1e-6 if is_double and x.dtype == jnp.float32 else gradient_tol
        if hasattr(wanted, "loss"):
            largest = np.max(np.abs(np.float32(cotangent)), initial=0.0)
            assert_gradient(name, grad, wanted, of, largest)
        else:
            assert_close(grad, want, of, name)


# The rows.

LOSSES = {name: Loss(name) for name in ("logits", "head", "function")}
LOSSES |= {x: Loss(x) for x in ("logits, head", "head, logits", "function, head")}
LOSSES |= {f"logits, {tail}": Loss(tail) for tail in TAILS}
LOSSES |= {
    x: Loss(x) for x in ("head, bucket", "head, conditional", "function, bucket")
}
LOSSES |= {
    f"cross_entropy of {source}": Loss(source, "cross_entropy")
    for source in ("logits", "head", "function")
}
LOSSES |= {
    f"log_probs of {source}": Loss(source, "token_log_probs", places=places)
    for source, places in (("logits", (3,)), ("head", ()), ("function", (2,)))
}
LOSSES |= {
    f"moving {name}": Loss(
        "head" if name in ("js", "kls") else "logits", divergence=f"moving {name}"
    )
    for name in MOVING
}


def over_losses(*quick, slow=None, without=()):
    """Parametrises a test over losses; those that are not `quick` are slow."""
    others = LOSSES if slow is None else slow
    others = [x for x in others if x not in (*quick, *without)]
    rows = [pytest.param(LOSSES[x], id=x) for x in quick]
    rows += [pytest.param(LOSSES[x], id=x, marks=pytest.mark.slow) for x in others]
    return pytest.mark.parametrize("loss", rows)


# What tokens hold.


def tokens_of(x):
    """The array of a source that has a row for each token."""
    return x.hidden if isinstance(x, LinearHead | FunctionHead) else x


def with_tokens(x, rows):
    return replace(x, hidden=rows) if isinstance(x, LinearHead | FunctionHead) else rows


def put_tokens(x, tokens, junk):
    """A source, a list or an array, of which these tokens hold `junk`."""
    if isinstance(x, SparseTeacher):
        indices = x.indices.at[tokens].set(99)
        return replace(x, indices=indices, log_probs=x.log_probs.at[tokens].set(junk))
    return with_tokens(x, tokens_of(x).at[tokens].set(junk))


DROPPED = np.array([1, 4])


def without_tokens(batch, junk):
    """The batch without two tokens, by `where`; and the same where they hold `junk`."""
    where = batch.others["where"].at[DROPPED].set(False).at[0].set(True)
    batch = batch._replace(others=batch.others | dict(where=where))
    tokens = lambda x: x.log_probs if isinstance(x, SparseTeacher) else tokens_of(x)
    spoil = lambda x: put_tokens(x, DROPPED, junk) if np.ndim(tokens(x)) else x
    spoilt = batch.map(spoil, *batch.floats, "teacher")
    return batch, spoilt.map(lambda x: x.at[DROPPED].set(99), "labels", "tokens")


def one_token(batch, index):
    """The batch of one index of the first axis of the tokens."""

    def of(x):
        if isinstance(x, LinearHead | FunctionHead):
            return with_tokens(x, x.hidden[index])
        return jax.tree.map(lambda x: x[index] if np.ndim(x) else x, x)

    return batch.map(of)
