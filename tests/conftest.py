import jax
import numpy as np
import pytest

from jaxkl._engine import rule

from .cases import forget_programs


# bfloat16 must not become float32, nor [B] broadcast against [B, V], without a word.
# Eight devices let every machine run the sharding tests.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="package", autouse=True)
def platforms():
    """Those of users. The tests have one, since tracing the plan of accelerators, which
    CPUs do not run, would take a fifth of their time; others ask for `all_platforms`.
    """
    platforms, rule.PLATFORMS = rule.PLATFORMS, ("cpu",)
    yield platforms
    rule.PLATFORMS = platforms


@pytest.fixture
def all_platforms(platforms, monkeypatch):
    """Programs are traced for all platforms, as users' are, until the end."""
    monkeypatch.setattr(rule, "PLATFORMS", platforms)
    forget_programs()
    yield
    forget_programs()
