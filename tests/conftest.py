import jax
import numpy as np
import pytest


# bfloat16 must not become float32, nor [B] broadcast against [B, V], without a word.
# Eight devices let every machine run the sharding tests.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
