"""What is meant by a keyword argument that a function does not have."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar


P = ParamSpec("P")
R = TypeVar("R")

# The names that other libraries have for ours.
_MEANT = {
    "mask": "where",
    "attention_mask": "where",
    "loss_mask": "where",
    "sample_weight": "weights",
    "sample_weights": "weights",
    "T": "temperature",
    "tau": "temperature",
    "targets": "labels",
    "num_items_in_batch": "normalizer",
    "chunk_size": "tile",
}


def suggest_keywords(f: Callable[P, R]) -> Callable[P, R]:
    """`f`, whose `TypeError` for an unknown keyword argument says what may be meant."""
    known = inspect.signature(f).parameters

    @functools.wraps(f)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                meant = _MEANT.get(name) or "".join(near)
                hint = f"; did you mean `{meant}`?" if meant else ""
                raise TypeError(
                    f"{f.__name__}() got an unexpected keyword argument `{name}`{hint}"
                )
        return f(*args, **kwargs)

    return checked
