"""Random arrays, heads and lists, and their logits in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxkl import FunctionHead, LinearHead, SparseTeacher

from . import oracle


TAILS = ("renormalize", "drop", "bucket", "uniform", "conditional")


def rounded(rng, shape, dtype="float32", scale=1.0):
    """Logits of order one: a saturated softmax hides missing mass and bad padding."""
    return jnp.asarray(scale * rng.normal(size=shape), dtype)


def make_head(rng, shape, hidden, vocab, dtype="float32", *, bias=False, **settings):
    """A head whose logits are of order one."""
    kernel = rng.normal(size=(hidden, vocab)) / np.sqrt(hidden)
    return LinearHead(
        jnp.asarray(rng.normal(size=(*shape, hidden)), dtype),
        jnp.asarray(kernel, dtype),
        jnp.asarray(rng.normal(size=vocab), dtype) if bias else None,
        **settings,
    )


CAP = 3.0


def normed(params, x):
    """The logits of an RMS norm, which is NaN at 0, and a product with a bias."""
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))
    return (x * params["scale"][None]) @ params["kernel"] + params["bias"][None]


def capped(params, x):
    """The same, and a soft cap."""
    return CAP * jnp.tanh(normed(params, x) / CAP)


def make_function(rng, shape, hidden, vocab, dtype="float32", apply=normed):
    """A head whose logits are of order one, from parameters of all kinds."""
    kernel = rng.normal(size=(hidden, vocab)) / np.sqrt(hidden)
    params = dict(
        scale=rounded(rng, (hidden,), dtype),
        kernel=jnp.asarray(kernel, dtype),
        bias=rounded(rng, (vocab,), dtype),
        absent=None,
    )
    return FunctionHead(apply, params, rounded(rng, (*shape, hidden), dtype))


def make_list(rng, shape, vocab, k, tail, dtype="float32"):
    """Some slots are empty, others repeat a column, and the mass is below one."""
    indices = rng.integers(0, vocab, size=(*shape, k))
    indices[..., -1] = indices[..., 0]
    indices[..., 1] = -1
    log_probs = np.log(rng.dirichlet(np.ones(k + 1), size=shape)[..., :k])
    return SparseTeacher(jnp.asarray(indices), jnp.asarray(log_probs, dtype), tail=tail)


def make_models(rng, source, shape, vocab, dtype="float32", *, pad=(0, 0), **settings):
    """A student and a teacher, both from `source`, or from two: "logits, head".

    A tail stands for a list, whose student has logits. `pad` is how many columns each
    model has beyond `vocab`, and `settings` are those of both heads.
    """
    student, _, teacher = source.partition(", ")

    def make(name, hidden, extra, **own):
        if name == "logits":
            return rounded(rng, (*shape, vocab + extra), dtype)
        if name == "head":
            own |= settings
            return make_head(rng, shape, hidden, vocab + extra, dtype, **own)
        if name == "function":
            apply = normed if own.get("bias") else capped
            return make_function(rng, shape, hidden, vocab + extra, dtype, apply)
        return make_list(rng, shape, vocab, 5, name, dtype)

    first = "logits" if student in TAILS else student
    return (
        make(first, 5, pad[0], bias=True, softcap=4.0, scale=0.7),
        make(teacher or student, 3, pad[1], softcap=2.5),
    )


def per_token(rng, shape, *names, vocab=11):
    """Arguments of these names with an entry for each token, some weights being 0."""
    uniform = lambda *ends: jnp.asarray(rng.uniform(*ends, size=shape), jnp.float32)
    draw = dict(
        temperature=lambda: uniform(0.5, 3),
        teacher_temperature=lambda: uniform(0.5, 3),
        weights=lambda: jnp.where(rng.random(shape) < 0.8, uniform(0.1, 2), 0),
        where=lambda: jnp.asarray(rng.random(shape) < 0.7),
        labels=lambda: jnp.asarray(rng.choice([-100, 0, vocab // 2, vocab - 1], shape)),
    )
    return {name: draw[name]() for name in names}


def exact_logits(source, vocab_size=None):
    """Logits in float64, and the function that pulls a gradient back to the source.

    Padding columns are sliced away first: they may hold anything. Lists have no logits,
    and the oracle takes them as they are.
    """
    if isinstance(source, SparseTeacher):
        return source, lambda d: d
    if isinstance(source, FunctionHead):
        return _exact_function(source, vocab_size)
    if not isinstance(source, LinearHead):
        return np.asarray(source, np.float64), lambda d: d
    hidden, kernel = (np.asarray(x, np.float64) for x in (source.hidden, source.kernel))
    width, kernel = kernel.shape[1], kernel[:, :vocab_size]
    x = source.scale * (hidden @ kernel)
    if source.bias is not None:
        x = x + np.asarray(source.bias, np.float64)[:vocab_size]
    cap = source.softcap
    logits = x if cap is None else cap * np.tanh(x / cap)

    def pull(d_logits):
        d_logits = np.asarray(d_logits, np.float64)
        d_x = d_logits if cap is None else d_logits / np.cosh(x / cap) ** 2
        rows = d_x.reshape(-1, d_x.shape[-1])
        wide = lambda d: np.pad(
            d, ((0, 0),) * (d.ndim - 1) + ((0, width - d.shape[-1]),)
        )
        flat = hidden.reshape(-1, hidden.shape[-1])
        return replace(
            source,
            hidden=source.scale * (d_x @ kernel.T),
            kernel=source.scale * wide(flat.T @ rows),
            bias=None if source.bias is None else wide(rows.sum(0)),
        )

    return logits, pull


def _exact_function(source, vocab_size):
    """The same for `normed` and `capped`."""
    x = np.asarray(source.hidden, np.float64)
    params = {
        name: np.asarray(source.params[name], np.float64)
        for name in ("scale", "kernel", "bias")
    }
    scale, width = params["scale"], params["bias"].size
    kernel, bias = params["kernel"][:, :vocab_size], params["bias"][:vocab_size]
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    unit = x / root
    z = (unit * scale) @ kernel + bias
    logits = CAP * np.tanh(z / CAP) if source.apply is capped else z

    def pull(d_logits):
        d_z = np.asarray(d_logits, np.float64)
        if source.apply is capped:
            d_z = d_z / np.cosh(z / CAP) ** 2
        rows = lambda x: x.reshape(-1, x.shape[-1])
        wide = lambda d: np.pad(
            d, ((0, 0),) * (d.ndim - 1) + ((0, width - d.shape[-1]),)
        )
        d_y = d_z @ kernel.T
        d_unit = d_y * scale
        along = np.mean(d_unit * unit, axis=-1, keepdims=True)
        params = dict(
            scale=rows(d_y * unit).sum(0),
            kernel=wide(rows(unit * scale).T @ rows(d_z)),
            bias=wide(rows(d_z).sum(0)),
            absent=None,
        )
        return replace(source, params=params, hidden=(d_unit - unit * along) / root)

    return logits, pull


def expected_of(student, teacher, *, vocab_size=None, **arguments):
    """The oracle's result, with the gradients of the sources in place of logits'."""
    s, pull_s = exact_logits(student, vocab_size)
    t, pull_t = exact_logits(teacher, vocab_size)
    result = oracle.distillation_loss(s, t, vocab_size=vocab_size, **arguments)
    return result._replace(
        student=pull_s(result.student), teacher=pull_t(result.teacher)
    )


def expected_cross_entropy(
    student, labels, *, where=None, vocab_size=None, **arguments
):
    """That of a distillation loss which is all cross-entropy."""
    logits, pull = exact_logits(student, vocab_size)
    counted = np.asarray(labels) != -100
    if where is not None:
        counted &= np.asarray(where)
    result = oracle.distillation_loss(
        logits, logits, labels=labels, alpha=0, where=counted, vocab_size=vocab_size,
        **arguments,
    )  # fmt: skip
    return result._replace(student=pull(result.student))


def expected_log_probs(student, tokens, *, cotangents, vocab_size=None, **arguments):
    """`tokens` are `[..., k]`."""
    logits, pull = exact_logits(student, vocab_size)
    result = oracle.token_log_probs(
        logits, tokens, cotangents=cotangents, vocab_size=vocab_size, **arguments
    )
    return result._replace(student=pull(result.student))
