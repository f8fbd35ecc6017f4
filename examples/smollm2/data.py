"""Cuts text into windows of tokens, and chooses those of each step."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Windows(NamedTuple):
    """Tokens, and labels: the next tokens, with -100 after the end of the text."""

    tokens: np.ndarray  # int32 [windows, length]
    labels: np.ndarray  # int32 [windows, length]


class Corpus(NamedTuple):
    train: Windows
    held_out: Windows  # the end of the text
    name: str
    sha256: str  # of the text


def language_reference():
    """Returns the reference of the Python language, which CPython ships.

    Its topics overlap. Each paragraph is used once, so that training never sees a
    held-out one.
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
    """Cuts the text in `path`, or the language reference if None, into windows.

    The last `held_out` windows are kept apart. Training uses at most `windows` others.
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
    """Returns the windows of a step. Each epoch has a new permutation of all.

    They depend only on the arguments, so a resumed run takes the same windows.
    """
    epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
    orders = {e: np.random.default_rng((seed, e)).permutation(count) for e in epochs}
    return np.array([orders[e][i] for e, i in zip(epochs, places, strict=True)])


def is_own_text(seed, step, share):
    """Whether a step is on the student's own text, as a share of them is."""
    return np.random.default_rng((seed, step, 0)).random() < share
