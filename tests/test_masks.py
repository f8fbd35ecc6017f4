"""Tokens and columns that do not count may hold anything, in every loss."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference
from jaxkl import LinearHead, SparseTeacher

from .cases import rarely
from .registry import (
    check,
    DROPPED,
    LOSSES,
    over_losses,
    pull_back,
    put_tokens,
    tokens_of,
    without_tokens,
)  # fmt: skip


FUNCTIONS = [x for x in LOSSES if "function" in x]
# At 0 a norm, and a division by a temperature, have no gradient.
over_junk = pytest.mark.parametrize("junk", [np.nan, *rarely(np.inf, 3e38, 0.0)])
# Of each kind of model one; others, with NaN alone, take part in other tests.
KINDS = "logits, head", "head, conditional", "cross_entropy of function"


def assert_nothing_of(gradients, tokens):
    for name, x in gradients.items():
        rows = tokens_of(x)
        if np.ndim(rows):
            assert not rows[tokens].any(), name


@over_losses(
    "logits", "head", "function", "logits, bucket", "log_probs of head", slow=KINDS
)
@over_junk
def test_a_token_that_where_drops_may_hold_anything(rng, loss, junk):
    batch, spoilt = without_tokens(loss.make(rng, (7,), 11), junk)
    tile = {} if loss.source.startswith("logits") else dict(tile=2)
    _, gradients = check(loss, rng, spoilt, exact=batch, **tile)
    assert_nothing_of(gradients, DROPPED)


@over_losses("head", "function", "logits, uniform", slow=KINDS)
@over_junk
def test_a_token_of_weight_0_may_hold_anything(rng, loss, junk):
    check_tokens_of_weight_0(rng, loss, junk)


def check_tokens_of_weight_0(rng, loss, junk):
    """Its weight has no gradient then, and is a constant here."""
    batch = loss.make(rng, (7,), 11).move("weights")
    weights = batch.others["weights"].at[DROPPED].set(0).at[0].set(1)
    batch = batch._replace(others=batch.others | dict(weights=weights))
    names = "student", "teacher", "temperature"
    spoilt = batch.map(lambda x: put_tokens(x, DROPPED, junk), *names)
    tile = {} if loss.source.startswith("logits") else dict(tile=2)
    for reduction in ("mean", "none"):
        _, gradients = check(
            loss, rng, spoilt, exact=batch, reduction=reduction, **tile
        )
        assert_nothing_of(gradients, DROPPED)


@over_losses(
    "cross_entropy of function",
    slow=("cross_entropy of logits", "cross_entropy of head"),
)
@pytest.mark.parametrize(
    "junk, module",
    [
        (0.0, jaxkl),
        (0.0, jaxkl.reference),
        *rarely((np.nan, jaxkl), (np.inf, jaxkl)),
    ],
)
def test_a_token_without_a_label_may_hold_anything(rng, loss, junk, module):
    batch = loss.make(rng, (7,), 11)
    labels = batch.others["labels"].at[DROPPED].set(-100).at[0].set(1)
    batch = batch._replace(others=batch.others | dict(labels=labels))
    spoilt = batch.map(lambda x: put_tokens(x, DROPPED, junk), "student")
    tile = dict(tile=2) if module == jaxkl and loss.source != "logits" else {}
    more = dict(exact=batch, reduction="none", module=module, tol=(1e-5, 2e-5))
    _, gradients = check(loss, rng, spoilt, **more, **tile)
    assert_nothing_of(gradients, DROPPED)


def of_columns(x, columns, junk, *, only_bias=False):
    """A model of which these columns hold `junk`, but for hidden states."""
    if isinstance(x, LinearHead):
        spoil = lambda x: x.at[..., columns].set(junk)
        kernel = x.kernel if only_bias else spoil(x.kernel)
        return replace(x, kernel=kernel, bias=None if x.bias is None else spoil(x.bias))
    return x if isinstance(x, SparseTeacher) else x.at[..., columns].set(junk)


@over_losses(
    "logits", "head", "logits, bucket", "cross_entropy of head",
    slow=("head, conditional", "log_probs of head"),
)  # fmt: skip
@over_junk
def test_columns_beyond_the_vocabulary_may_hold_anything(rng, loss, junk):
    batch = loss.make(rng, (7,), 11, pad=2)
    beyond = slice(11, None)
    spoil = lambda x: of_columns(x, beyond, junk)
    spoilt = batch.map(spoil, "student", "teacher")
    _, gradients = check(loss, rng, spoilt, exact=batch, vocab_size=11)
    for name in ("student", "teacher"):
        for x in jax.tree.leaves(gradients.get(name)):
            if x.shape[-1] > 11:
                assert not x[..., beyond].any()


@over_losses(
    "logits",
    "head",
    "cross_entropy of logits",
    "log_probs of head",
    # A function may make anything of it, and a list's rest is spread over them too.
    without=(*FUNCTIONS, "logits, uniform"),
)
def test_columns_at_minus_infinity_are_as_if_absent(rng, loss):
    """In both models; and no list, label or token names one."""
    batch = loss.make(rng, (7,), 11, softcap=None, bias=True)
    masked = np.array([3, 4, 8])
    mask = lambda x: of_columns(x, masked, -jnp.inf, only_bias=True)
    batch = batch.map(mask, "student", "teacher")
    present = lambda x, absent: jnp.where(jnp.isin(x, masked), absent, x)
    others = dict(batch.others)
    for name, absent in (("labels", -100), ("tokens", -1)):
        if name in others:
            others[name] = present(others[name], absent)
    if loss.is_listed:
        teacher = others["teacher"]
        others["teacher"] = replace(teacher, indices=present(teacher.indices, -1))
    _, gradients = check(loss, rng, batch._replace(others=others))
    for name in ("student", "teacher"):
        for x in jax.tree.leaves(gradients.get(name)):
            if x.shape[-1] == 11:
                assert not x[..., masked].any()


@over_losses("logits", "head", "function", "logits, bucket", "log_probs of logits")
@pytest.mark.parametrize("shape", [(3,), (0,), *rarely(((2, 0),))])
@pytest.mark.parametrize(
    "by, module",
    [("where", jaxkl), *rarely(("weights", jaxkl), ("where", jaxkl.reference))],
)
def test_no_token_is_a_loss_of_0(rng, loss, shape, by, module):
    """Those that do not count hold NaN."""
    batch = loss.make(rng, shape, 11)
    if by == "weights" and by in batch.floats:
        batch = batch.map(jnp.zeros_like, by).move(by)  # with no gradient at NaN
    else:
        batch = batch.map(jnp.zeros_like, "where")
    batch = batch.map(lambda x: put_tokens(x, slice(None), jnp.nan), "student")
    of = partial(loss, module=module)
    value, gradients = pull_back(of, batch, loss.cotangent(rng, batch))
    assert not any(x.any() for x in jax.tree.leaves((value, gradients)))
    like = jax.tree.map(lambda x: (x.shape, x.dtype), (gradients, batch.floats))
    assert like[0] == like[1]
