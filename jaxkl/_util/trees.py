"""Trees of flags or dtypes beside trees of arrays."""

from typing import Any

import jax


def keep(flags: Any, tree: Any) -> Any:
    """The leaves of `tree` whose flag holds, and None for the others."""
    return jax.tree.map(lambda flag, x: x if flag else None, flags, tree)


def split(flags: Any, tree: Any) -> tuple[Any, Any]:
    """Two trees: the leaves whose flag does not hold, and those whose flag does."""
    return keep(jax.tree.map(lambda flag: not flag, flags), tree), keep(flags, tree)


def merge(tree: Any, other: Any) -> Any:
    """The leaves of `tree`, and those of `other` where `tree` has None."""
    pick = lambda x, y: y if x is None else x
    return jax.tree.map(pick, tree, other, is_leaf=lambda x: x is None)


def cast(dtypes: Any, tree: Any) -> Any:
    """Each leaf of `tree` in its dtype; None where it is None or its dtype is False.

    A dtype of True keeps the leaf as it is.
    """

    def of_dtype(dtype, x):
        if x is None or not dtype:
            return None
        return x if dtype is True else x.astype(dtype)

    return jax.tree.map(of_dtype, dtypes, tree)
