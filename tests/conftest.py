import jax
import numpy as np
import pytest


# No silent bf16 -> f32 or [B] against [B, V]; sharding tests on any machine.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
