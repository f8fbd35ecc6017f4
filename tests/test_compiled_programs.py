"""Logits that are made in the program of the loss, as users compile it.

Tests elsewhere make logits in one program and the loss in another. Users compile both
together, and a compiler may then make the logits again in each of the fusions that read
them, and round them in each as it likes: it contracts `a * b - max` into one operation.
So no two values that are equal to the mathematics need be equal to the bit. It shows in
rows of which one column is nearly certain: what is asked of them is as small as what
that column lacks to 1.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl import FunctionHead, LinearHead
from jaxkl._engine.plan import Plan

from . import oracle
from .cases import CATALOGUE, rarely, taking


HIDDEN, VOCAB = 257, 401
# The largest logits of nearly certain rows, of which 1e-2 to 1e-9 is left to others.
TOPS = {
    "student": [13, 15, 17, 19, 21, 23, 25, 28],
    "teacher": [15, 14, 17, 21, 19, 27, 26, 25],
}
COLUMNS = np.array([0, 7, 57, 127, 128, 255, 399, 400])  # where these are
ABSENT = np.arange(VOCAB) % 9 == 5


class Arrays(NamedTuple):
    """All that a program is given."""

    student: Any  # hidden states
    teacher: Any
    kernel: Any
    bias: Any
    absent: Any  # the columns that some ways mask
    labels: Any
    tokens: Any
    share: Any  # of a divergence in a mixture
    cotangent: Any


class Way(NamedTuple):
    """A way to make logits: a head, or a user's own arithmetic.

    They are `cap · tanh(x / cap)` with `x = scale · (hidden @ kernel) + bias`, whatever
    operations `make` has for it.
    """

    make: Callable[[Any, Arrays], Any]  # from hidden states
    scale: float = 1.0
    cap: float | None = None
    bias: bool = False
    fill: float | None = None  # what absent columns hold
    epsilon: float = float(np.finfo(np.float32).eps)

    def logits(self, hidden, x):
        """The logits in float64, and the function that pulls a gradient back."""
        kernel = x.kernel.astype(np.float64)
        product = self.scale * (hidden.astype(np.float64) @ kernel)
        logits = product + x.bias.astype(np.float64) if self.bias else product
        slope = np.ones_like(logits)
        if self.cap is not None:
            tanh = np.tanh(logits / self.cap)
            logits, slope = self.cap * tanh, 1 - tanh**2
        if self.fill is not None:
            logits = np.where(x.absent, self.fill, logits)
        return logits, lambda d: self.scale * (d * slope) @ kernel.T

    def hidden(self, tops, kernel):
        """Hidden states of which these are the largest logits, but for the bias."""
        x = np.asarray(tops, np.float64)
        x = x if self.cap is None else self.cap * np.arctanh(x / self.cap)
        of_columns = kernel.T[COLUMNS]
        squares = np.sum(of_columns**2, -1, keepdims=True)
        return (x / self.scale)[:, None] * of_columns / squares


def linear(scale=1.0, cap=None, bias=False):
    def make(hidden, x):
        added = x.bias if bias else None
        return LinearHead(hidden, x.kernel, added, scale=scale, softcap=cap)

    return Way(make, scale, cap, bias)


def function(apply, **exact):
    return Way(lambda hidden, x: FunctionHead(apply, x.kernel, hidden), **exact)


def masked(fill):
    fill = np.float32(fill)

    def make(hidden, x):
        return jnp.where(x.absent[None], fill, (hidden @ x.kernel) / 1.7)

    return Way(make, 1 / 1.7, fill=fill)


def product(kernel, hidden):
    return (hidden @ kernel) * 0.77


def capped(kernel, hidden):
    return 30 * jnp.tanh(hidden @ kernel / 30)


def in_bfloat16(hidden, x):
    return (hidden @ x.kernel).astype(jnp.bfloat16) * jnp.bfloat16(0.77)


WAYS = {
    "softcap": linear(cap=30.0),
    "scale": linear(1 / 1.7),
    "all of a head": linear(1 / 1.7, 30.0, bias=True),
    "function": function(product, scale=0.77),
    "function, cap": function(capped, cap=30.0),
    "quotient": Way(lambda hidden, x: (hidden @ x.kernel) / 1.7, 1 / 1.7),
    "tanh": Way(lambda hidden, x: capped(x.kernel, hidden), cap=30.0),
    # A compiler may leave out a rounding to bfloat16, and need not.
    "bfloat16": Way(in_bfloat16, float(jnp.bfloat16(0.77)), epsilon=2.0**-8),
    "masked": masked(-np.inf),
    "lowest": masked(np.finfo(np.float32).min),
}


def make_arrays(way):
    """Rows that are nearly certain in both models; some of these with a teacher that is
    near the student or equal to it; and ordinary ones."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(HIDDEN, VOCAB)) / np.sqrt(HIDDEN)
    student, teacher = (way.hidden(TOPS[name], kernel) for name in TOPS)
    noise = lambda x: rng.normal(size=x.shape)
    teacher += 0.5 * noise(teacher) / way.scale
    again = student[1::3]
    ordinary = rng.normal(size=(2, 3, HIDDEN)) / way.scale
    student = np.concatenate([student, again, again, ordinary[0]])
    near = again * (1 + 1e-4 * noise(again))
    teacher = np.concatenate([teacher, near, again, ordinary[1]])
    rows = len(student)
    labels = rng.integers(0, VOCAB, rows)
    labels[: len(COLUMNS)] = COLUMNS
    labels[2] = 31  # and a label that the student nearly rules out
    tokens = np.stack([labels, (labels + 9) % VOCAB, 0 * labels], -1)
    labels, tokens = (x + ABSENT[x] for x in (labels, tokens))
    tokens[:, 2] = -1
    floats = student, teacher, kernel, 0.5 * rng.normal(size=VOCAB)
    share, cotangent = rng.uniform(0.1, 0.9, rows), rng.uniform(0.5, 2, rows)
    return Arrays(
        *(x.astype(np.float32) for x in floats),
        *(ABSENT, labels, tokens),
        *(x.astype(np.float32) for x in (share, cotangent)),
    )


class Case(NamedTuple):
    """A function of the student, or of both models.

    `expected` takes logits in float64 and the cotangents of what `value` returns. It
    returns the same values, and the gradients of the logits.
    """

    value: Callable[..., Any]  # of the arrays, the models and a plan
    expected: Callable[..., tuple[Any, tuple[Any, ...]]]
    of: tuple[str, ...] = ("student", "teacher")
    floors: tuple[float, ...] = ()  # errors that values may have besides


def cross_entropy(**arguments):
    def value(x, student, **plan):
        return jaxkl.cross_entropy(student, x.labels, **arguments, **plan)

    def expected(x, g, s):
        alone = dict(labels=x.labels, alpha=0, cotangent=g)
        result = oracle.distillation_loss(s, s, **alone, **arguments)
        return result.loss, (result.student,)

    return Case(value, expected, ("student",))


def log_probs(name, **arguments):
    def value(x, student, **plan):
        tokens = getattr(x, name)
        return jaxkl.token_log_probs(
            student, tokens, with_entropy=True, **arguments, **plan
        )

    def expected(x, g, s):
        tokens = getattr(x, name)
        of_each = lambda x: x.reshape(len(x), -1)
        result = oracle.token_log_probs(
            s, of_each(tokens), cotangents=(of_each(g[0]), g[1]), **arguments
        )
        log_probs = result.log_probs.reshape(tokens.shape)
        return (log_probs, result.entropy), (result.student,)

    return Case(value, expected, ("student",))


MIXTURES = {
    "symmetric, array": (jaxkl.SymmetricKL, oracle.symmetric_kl),
    "mixture, array": (
        lambda w: jaxkl.Mixture(((w, jaxkl.JensenShannon()), (2.0, jaxkl.ReverseKL()))),
        lambda w: oracle.mixture(
            (w, oracle.jensen_shannon()), (2.0, oracle.reverse_kl)
        ),
    ),
}
METRICS = "kl", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement"


def divergence(name, **arguments):
    def of(x, side):
        if name in CATALOGUE:
            return CATALOGUE[name][side]
        make = MIXTURES[name][side]
        return oracle.by_token([make(w) for w in x.share]) if side else make(x.share)

    def labels(x):
        return dict(labels=x.labels) if "alpha" in arguments else {}

    def value(x, student, teacher, **plan):
        more = dict(divergence=of(x, 0), differentiate_teacher=True) | labels(x)
        return jaxkl.distillation_loss(student, teacher, **more, **arguments, **plan)

    def expected(x, g, s, t):
        more = dict(divergence=of(x, 1), cotangent=g) | labels(x)
        result = oracle.distillation_loss(s, t, **more, **arguments)
        return result.loss, (result.student, result.teacher)

    return Case(value, expected)


def metrics():
    def value(x, student, teacher, **plan):
        both = dict(differentiate_teacher=True, per_token_metrics=True)
        loss, of_rows = jaxkl.distillation_loss_with_metrics(
            student, teacher, labels=x.labels, **both, **plan
        )
        return (loss, *(getattr(of_rows, name) for name in METRICS))

    def expected(x, g, s, t):
        result = oracle.distillation_loss(s, t, cotangent=g[0])
        rows = [
            oracle.metrics(s[[i]], t[[i]], labels=x.labels[[i]]) for i in range(len(s))
        ]
        of_rows = (np.array([getattr(x, name) for x in rows]) for name in METRICS)
        return (result.loss, *of_rows), (result.student, result.teacher)

    # Entropies are sums of plain products, in which the logarithm of a nearly certain
    # column has the rounding of 1.
    of_metrics = dict(student_entropy=1e-6, teacher_entropy=1e-6)
    floors = (of_metrics.get(name, 0.0) for name in METRICS)
    return Case(value, expected, floors=(0.0, *floors))


def largest(k):
    """The log-probabilities of a list, which is a constant."""

    def value(x, student):
        return jax.lax.stop_gradient(jaxkl.top_k_teacher(student, k).log_probs)

    def expected(x, g, s):
        return np.sort(oracle.log_softmax(s), -1)[:, : -k - 1 : -1], (np.zeros_like(s),)

    return Case(value, expected, ("student",))


def divergences(names, **arguments):
    return {f"{name} {arguments}": divergence(name, **arguments) for name in names}


FEW = "forward", "reverse"
REST = [x for x in CATALOGUE if x not in FEW]
FAMILIES = {
    "alone": {
        "cross_entropy, none": cross_entropy(reduction="none"),
        "cross_entropy, mean": cross_entropy(),
        "cross_entropy, smoothed": cross_entropy(label_smoothing=0.1, z_loss=1e-3),
        "log_probs": log_probs("labels", temperature=1.7),
        "log_probs, several": log_probs("tokens"),
    },
    "compared": {
        **divergences(FEW, reduction="none"),
        **divergences(("symmetric, array",), temperature=1.7),
        **divergences(("forward",), alpha=0.3),
        "metrics": metrics(),
    },
    "rest": divergences(REST),
    "rest, none": {
        **divergences((*REST, "mixture, array"), reduction="none"),
    },
    "temperature": {
        **divergences((*REST, "symmetric, array"), reduction="none", temperature=1.7),
        **divergences((*FEW, "js", "mixture, array"), temperature=1.7),
    },
}


@pytest.fixture(autouse=True)
def all_optimisations():
    """Compiles as users do, where `make test` is to compile quickly too."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# As XLA has it by default: see conftest.py, which sets it where the flag is known.
KNOWS_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
OPTIONS = {"xla_cpu_use_fusion_emitters": True} if KNOWS_EMITTERS else {}


def over_programs(*quick, newest, rare):
    """Parametrises a test over ways and families. All optimisations take their time:
    few are `quick`, and on the newest JAX, which users have, there are more."""
    marks = pytest.mark.slow, pytest.mark.newest
    often = [pytest.param(*x, marks=marks) for x in newest]
    others = [x for x in rare if x not in (*quick, *newest)]
    return pytest.mark.parametrize("way, family", [*quick, *often, *rarely(*others)])


@pytest.mark.parametrize("way", ["quotient", *rarely("tanh", "bfloat16", "masked")])
def test_a_list_of_the_largest(way):
    assert_right(WAYS[way], {"top_k_teacher": largest(3)})


HEADS = "softcap", "scale", "all of a head", "function", "function, cap"


@over_programs(
    ("softcap", "alone"),
    newest=[
        ("scale", "compared"),
        ("function", "alone"),
        ("quotient", "compared"),
        ("tanh", "alone"),
    ],
    rare=[(way, family) for way in WAYS for family in FAMILIES],
)
def test_tokens_at_once(way, family):
    """Or tiles of a head: those of logits would be slices of stored ones."""
    tile = dict(tile=4) if way in HEADS else {}
    assert_right(WAYS[way], FAMILIES[family], **tile)


@over_programs(
    newest=[("scale", "alone"), ("softcap", "compared")],
    rare=[(way, family) for way in HEADS[:3] for family in FAMILIES],
)
def test_blocks_of_columns(monkeypatch, way, family):
    with taking(monkeypatch) as take:
        take(Plan(None, "blocks", False, columns=128))  # the last has 17
        assert_right(WAYS[way], FAMILIES[family])


def assert_right(way, cases, **plan):
    """Values and gradients of the cases, in one program, against the oracle."""
    if way.fill is not None:  # over these columns nothing can be spread
        cases = {k: v for k, v in cases.items() if "smoothed" not in k}

    def evaluate(case, x):
        make = lambda hidden: way.make(hidden, x)
        at = tuple(getattr(x, name) for name in case.of)
        if not is_head:  # then by the logits, which are more than hidden states
            at, make = tuple(map(make, at)), lambda logits: logits
        f = lambda *at: case.value(x, *map(make, at), **plan)
        value, pull = jax.vjp(f, *at)
        g = jax.tree.map(lambda y: cotangent_of(y, x.cotangent), value)
        return value, pull(g), g

    x = make_arrays(way)
    is_head = not isinstance(
        jax.eval_shape(way.make, x.student, x), jax.ShapeDtypeStruct
    )
    # Each case has arguments of its own. So the compiler fuses it as if it were alone
    # in its program, as it is in users', and nothing that two cases share is stored.
    run = jax.jit(
        lambda of_cases: {k: evaluate(cases[k], x) for k, x in of_cases.items()},
        compiler_options=OPTIONS,
    )
    results = run(dict.fromkeys(cases, x))
    wrong = [
        f"{name}: {what}"
        for name, result in results.items()
        for what in differences(way, cases[name], x, is_head, *result)
    ]
    assert not wrong, "\n".join(wrong)


def cotangent_of(value, of_rows):
    """Another one for each row, of each value that has rows."""
    if value.ndim == 0:
        return jnp.ones_like(value)
    of_rows = jnp.expand_dims(of_rows, range(1, value.ndim))
    return jnp.broadcast_to(of_rows, value.shape)


def differences(way, case, x, is_head, value, gradients, g):
    """What is wrong with values and gradients, if anything is.

    Logits are rounded wherever they are made, and the hardest row is as right as its
    logits: so an error may be as large as what a change of these by a few of their
    last digits makes. To this comes what is the loss's own: 1e-5 of an entry of the
    values, and of the largest in a row of gradients.
    """
    rng = np.random.default_rng(2)
    models = [way.logits(getattr(x, name), x) for name in case.of]

    def expected(size):
        def moved(logits):
            ordinary = np.where(np.abs(logits) < 1e30, logits, 0)
            step = size * np.max(np.abs(ordinary), -1, keepdims=True)
            return logits + np.where(
                ordinary == logits, step * rng.uniform(-1, 1, logits.shape), 0
            )

        values, slopes = case.expected(x, g, *(moved(s) for s, _ in models))
        if is_head:
            slopes = [pull(d) for (_, pull), d in zip(models, slopes, strict=True)]
        return [np.asarray(x, np.float64) for x in (*jax.tree.leaves(values), *slopes)]

    wants = expected(0.0)
    others = [expected(8 * way.epsilon) for _ in range(6)]
    values = jax.tree.leaves(value)
    for i, actual in enumerate((*values, *gradients)):
        is_gradient = i >= len(values)
        if is_gradient and is_head:
            actual = actual.hidden if hasattr(actual, "hidden") else actual
        # Gradients have the dtype of the logits.
        own = 2 * way.epsilon if is_gradient and not is_head else 0.0
        error, size, bound = (
            np.atleast_1d(np.max(np.abs(x), -1) if is_gradient else np.abs(x))
            for x in (
                np.asarray(actual, np.float64) - wants[i],
                wants[i],
                np.max([np.abs(x[i] - wants[i]) for x in others], 0),
            )
        )
        floor = case.floors[i] if i < len(case.floors) else 0.0
        allowed = (1e-5 + own) * size + bound + floor
        is_wrong = ~(error <= allowed)
        if is_wrong.any():
            first = np.argmax(is_wrong)
            of_first = [x.flat[first] for x in (error, size, allowed)]
            what = "gradient" if is_gradient else "value"
            yield (
                f"{what} {i}: {is_wrong.sum()} of {is_wrong.size} rows, number {first} "
                "with an error of {:.1e} beside {:.1e}, allowed {:.1e}".format(
                    *of_first
                )
            )
