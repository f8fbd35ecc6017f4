"""Every loss in half precision and in float64."""

import jax
import pytest

import jaxkl.reference

from .cases import rarely
from .registry import check, over_losses


@over_losses(
    "logits", "head", "logits, bucket", "cross_entropy of head", "log_probs of head"
)
@pytest.mark.parametrize("dtype", ["bfloat16", *rarely("float16")])
def test_half_precision(rng, loss, dtype):
    check(loss, rng, loss.make(rng, (3, 5), 37, dtype))


@over_losses("head")
def test_float64(rng, loss):
    with jax.enable_x64(True):
        check(loss, rng, loss.make(rng, (3, 5), 11, "float64"))


@over_losses("logits", slow=("head", "logits, bucket", "log_probs of head"))
@pytest.mark.parametrize("dtype", ["float64", *rarely("bfloat16", "float16")])
def test_of_the_reference(rng, loss, dtype):
    with jax.enable_x64(dtype == "float64"):
        batch = loss.make(rng, (3, 5), 11, dtype)
        check(loss, rng, batch, module=jaxkl.reference)
