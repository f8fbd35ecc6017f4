"""Text as windows of tokens, and which of them a step takes."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Windows(NamedTuple):
    """Tokens and, as labels, those that follow; -100 where the text has ended."""

    tokens: np.ndarray  # int32 [windows, length]
    labels: np.ndarray  # int32 [windows, length]


class Corpus(NamedTuple):
    train: Windows
    held_out: Windows  # the end of the text
    name: str
    sha256: str  # of the text


def language_reference():
    """The reference of the Python language, which CPython ships.

    Its topics overlap: each paragraph is taken once, lest held-out ones be trained on.
    """
    from pydoc_data.topics import topics

    paragraphs = (x for topic in topics.values() for x in topic.strip().split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def read(path):
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from error


def load(path, tokenizer, length, held_out, windows=None):
    """The text in `path`, or the language reference if None, cut into windows.

    The last `held_out` are kept apart; `windows` bounds those that are trained on.
    """
    text = language_reference() if path is None else read(Path(path))
    name = "the Python language reference" if path is None else Path(path).name
    tokens = np.array(tokenizer.encode(text).ids, np.int32)
    count = -(-(len(tokens) - 1) // length)
    if count < held_out + 1:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, too few for {held_out} held-out windows "
            f"of {length} and one to train on."
        )
    padding = count * length + 1 - len(tokens)
    labels = np.pad(tokens[1:], (0, padding), constant_values=-100)
    tokens = np.pad(tokens[:-1], (0, padding))
    both = tokens.reshape(count, length), labels.reshape(count, length)
    train = Windows(*(x[: count - held_out][:windows] for x in both))
    rest = Windows(*(x[count - held_out :] for x in both))
    return Corpus(train, rest, name, hashlib.sha256(text.encode()).hexdigest())


def batch_indices(seed, step, size, count):
    """The windows of a step, from a new permutation of all in each epoch.

    A function of its arguments alone: a resumed run takes what it would have taken.
    """
    epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
    orders = {e: np.random.default_rng((seed, e)).permutation(count) for e in epochs}
    return np.array([orders[e][i] for e, i in zip(epochs, places, strict=True)])
