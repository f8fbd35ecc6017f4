"""Trees of which a part is at hand: the other leaves are None."""

from typing import Any

import jax


def partition(flags: Any, tree: Any) -> tuple[Any, Any]:
    """The leaves of `tree` whose flag holds, and those whose flag does not."""
    kept = jax.tree.map(lambda flag, x: x if flag else None, flags, tree)
    rest = jax.tree.map(lambda flag, x: None if flag else x, flags, tree)
    return kept, rest


def combine(tree: Any, other: Any) -> Any:
    """The leaves of `tree`, and those of `other` where `tree` has none."""
    return jax.tree.map(lambda x, y: y if x is None else x, tree, other, is_leaf=_none)


def select(like: Any, tree: Any) -> Any:
    """The leaves of `tree` where `like` has one."""
    pick = lambda at, x: None if at is None else x
    return jax.tree.map(pick, like, tree, is_leaf=_none)


def cast(dtypes: Any, tree: Any) -> Any:
    """The leaves of `tree` that have a dtype, in this dtype."""
    to = lambda dtype, x: None if dtype is None or x is None else x.astype(dtype)
    return jax.tree.map(to, dtypes, tree, is_leaf=_none)


def _none(x: Any) -> bool:
    return x is None
