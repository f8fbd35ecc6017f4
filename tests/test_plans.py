"""Plans that CPUs do not take by themselves, at sizes that nothing divides.

Tiles leave their products to a part of the tokens; or all tokens are taken at once, and
a block of columns at a time.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
from jaxkl._engine.plan import Plan

from .cases import rarely, taking
from .helpers import assert_close
from .registry import check, Loss, LOSSES, over_losses, pull_back, put_tokens
from .test_masks import check_tokens_of_weight_0
from .test_meshes import axes_of
from .test_transforms import assert_each, stacked


TOKENS, VOCAB, TILE = 21, 29, 4
# Of three parts the last is padded, or takes tokens again; one part holds all tokens.
PLANS = {
    f"{order} {part}": Plan(TILE, order, True, part)
    for order in ("strided", "blocks")
    for part in (8, 24)
}
# The last of four blocks has fewer columns than the others.
LEAN = Plan(None, "blocks", False, columns=8)
over_plans = pytest.mark.parametrize("name", ["strided 8", *rarely("blocks 24")])
MADE = "head", "function"  # of products
OF_LOGITS = [x for x in LOSSES if not any(of in LOSSES[x].source for of in MADE)]
OF_FUNCTIONS = [x for x in LOSSES if "function" in x]


@pytest.fixture
def take(monkeypatch):
    with taking(monkeypatch) as take:
        yield take


def check_with_nan(loss, rng, **options):
    """A token that does not count holds NaN."""
    batch = loss.make(rng, (TOKENS,), VOCAB - 2, pad=2)
    drop = np.array([2, 20])
    where = batch.others["where"].at[drop].set(False)
    batch = batch._replace(others=batch.others | dict(where=where))
    spoilt = batch.map(lambda x: put_tokens(x, drop, jnp.nan), "student", "temperature")
    check(loss, rng, spoilt, exact=batch, vocab_size=VOCAB - 2, **options)


def for_each_token(loss):
    return {} if loss.function == "token_log_probs" else dict(reduction="none")


@over_losses(
    "head", "function", "cross_entropy of head", "log_probs of function",
    without=OF_LOGITS,
)  # fmt: skip
@over_plans
def test_products_of_a_part_of_the_tokens(rng, take, name, loss):
    take(PLANS[name])
    check_with_nan(loss, rng, **for_each_token(loss))


@over_losses(
    "head", "logits, bucket", "cross_entropy of head", "log_probs of logits",
    without=OF_FUNCTIONS,
)  # fmt: skip
def test_blocks_of_columns(rng, take, loss):
    take(LEAN)
    check_with_nan(loss, rng)


@over_losses("head", "logits, uniform", slow=("head, bucket", "moving kls"))
def test_the_lean_plan_by_name(rng, loss):
    check_with_nan(loss, rng, plan="lean")


@over_losses(
    "head", "function", slow=("cross_entropy of head", "log_probs of head"),
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float16")])
def test_half_precision(rng, take, loss, dtype):
    take(PLANS["blocks 8"])
    check(loss, rng, loss.make(rng, (TOKENS,), VOCAB, dtype))


@over_losses("head", slow=("function", "cross_entropy of head", "log_probs of head"))
@over_plans
@pytest.mark.parametrize(
    "names", [("student",), *rarely((("temperature", "weights"),))]
)
def test_constants(rng, take, loss, name, names):
    """What has no gradient makes no product."""
    take(PLANS[name])
    check(loss, rng, loss.make(rng, (TOKENS,), VOCAB).move(*names))


@over_losses("head", slow=("function", "head, bucket", "log_probs of head"))
@pytest.mark.parametrize("tile", [3, *rarely(1, 20, 100)])
def test_any_tile(rng, loss, tile):
    options = dict(tile=tile) | for_each_token(loss)
    check(loss, rng, loss.make(rng, (TOKENS,), VOCAB), **options)


over_all_plans = pytest.mark.parametrize(
    "plan",
    [
        pytest.param(PLANS["strided 8"], id="strided 8"),
        pytest.param(LEAN, id="lean", marks=pytest.mark.slow),
    ],
)


@over_all_plans
@pytest.mark.parametrize("divergence", ["reverse", *rarely("js", "user")])
def test_divergences(rng, take, plan, divergence):
    take(plan)
    loss = replace(LOSSES["head"], divergence=divergence)
    check(loss, rng, loss.make(rng, (TOKENS,), VOCAB))


@over_all_plans
def test_a_token_of_weight_0_may_hold_nan(rng, take, plan):
    take(plan)
    check_tokens_of_weight_0(rng, LOSSES["head"], np.nan)


@over_all_plans
@pytest.mark.parametrize("names", ["kernel, bias", *rarely("kernel", "hidden")])
def test_frozen_arrays(rng, take, plan, names):
    """The others' gradients are the same, and those of frozen ones are 0."""
    loss, names = LOSSES["head"], names.split(", ")

    def frozen(student, **arguments):
        stopped = {x: jax.lax.stop_gradient(getattr(student, x)) for x in names}
        return jaxkl.distillation_loss(replace(student, **stopped), **arguments)

    batch = loss.make(rng, (TOKENS,), VOCAB)
    want, wanted = pull_back(loss, batch, np.float32(1.3))
    take(plan)
    value, got = pull_back(lambda batch: loss(batch, f=frozen), batch, np.float32(1.3))
    zeros = {x: jnp.zeros_like(getattr(got["student"], x)) for x in names}
    wanted["student"] = replace(wanted["student"], **zeros)
    for x, y in zip(*map(jax.tree.leaves, ((value, got), (want, wanted))), strict=True):
        assert_close(x, y, 1e-5)


@over_all_plans
@pytest.mark.parametrize("source", ["head, conditional", *rarely("head, logits")])
def test_metrics(rng, take, plan, source):
    loss = Loss(source)
    batch = loss.make(rng, (TOKENS,), VOCAB)
    f = jaxkl.distillation_loss_with_metrics
    run = lambda: jax.jit(lambda batch: loss(batch, f=f))(batch)
    want = run()
    take(plan)
    for x, y in zip(*map(jax.tree.leaves, (run(), want)), strict=True):
        assert_close(x, y, 1e-5)


@over_all_plans
def test_vmap(rng, take, plan):
    take(plan)
    loss = LOSSES["head"]
    batches, cotangents, stack, g = stacked(rng, loss, tokens=TOKENS, vocab=VOCAB)
    run = jax.jit(jax.vmap(partial(pull_back, loss)))
    assert_each(loss, batches, cotangents, *run(stack, g))


# There are 11 tokens on each device, and 8 columns, some of them padding.
@pytest.mark.parametrize(
    "plan",
    [
        Plan(TILE, "blocks", True, 8),
        *rarely(Plan(TILE, "blocks", True, 4), Plan(None, "blocks", False, columns=3)),
    ],
    ids=["blocks 8", "blocks 4", "lean"],
)
@pytest.mark.parametrize("source", ["head", *rarely("head, bucket")])
def test_mesh(rng, take, plan, source):
    take(plan)
    loss = Loss(source)
    batch = loss.make(rng, (TOKENS,), VOCAB)
    check(loss, rng, batch, **axes_of("2x4"), reduction="none")


def test_sums_over_plans_are_in_float32(rng, take):
    """A sum of bfloat16 parts would round at each addition."""
    batch = LOSSES["head"].make(rng, (256,), VOCAB, "bfloat16")
    models = batch.floats["student"], batch.floats["teacher"]
    slope = jax.grad(jaxkl.distillation_loss)
    take(Plan(TILE, "blocks", True, 256))
    once = slope(*models).kernel
    take(Plan(TILE, "blocks", True, TILE))
    assert_close(slope(*models).kernel, once, 2**-8)
