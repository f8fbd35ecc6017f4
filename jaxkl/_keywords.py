"""Keyword arguments that a function does not have."""

import difflib
from collections.abc import Collection, Iterable


# By the names that other libraries have for them.
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


def check_keywords(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Else the error is Python's, of that function, with a guess at what is meant."""
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        meant = _MEANT.get(name) or "".join(near)
        hint = f"; did you mean `{meant}`?" if meant else ""
        raise TypeError(
            f"{function}() got an unexpected keyword argument `{name}`{hint}"
        )
