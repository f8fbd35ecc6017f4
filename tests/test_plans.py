"""Plans that CPUs do not take by themselves, at sizes that nothing divides.

Tiles leave their products to a part of the tokens; or all tokens are taken at once, and
a block of columns at a time.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkl._engine.plan import Plan

from .cases import rarely, taking
from .registry import check, LOSSES, over_losses, put_tokens


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
OF_LOGITS = [x for x in LOSSES if not ("head" in x or "function" in x)]
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


@over_losses(
    "head", "function", "cross_entropy of head", "log_probs of function",
    without=OF_LOGITS,
)  # fmt: skip
@over_plans
def test_products_of_a_part_of_the_tokens(rng, take, name, loss):
    take(PLANS[name])
    check_with_nan(loss, rng)


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
    options = {} if loss.function == "token_log_probs" else dict(reduction="none")
    check(loss, rng, loss.make(rng, (TOKENS,), VOCAB), tile=tile, **options)
