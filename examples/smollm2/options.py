"""Defines the types of command-line options, and the options that programs share."""

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path

import optax

import jaxkl


DIVERGENCES = {
    "forward-kl": jaxkl.ForwardKL,
    "reverse-kl": jaxkl.ReverseKL,
    "symmetric-kl": jaxkl.SymmetricKL,
    "jensen-shannon": jaxkl.JensenShannon,
    "skew-forward-kl": jaxkl.SkewForwardKL,
    "skew-reverse-kl": jaxkl.SkewReverseKL,
    "total-variation": jaxkl.TotalVariation,
    "alpha": jaxkl.AlphaDivergence,
}


class Formatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Keeps the description as it is, and shows defaults of options that have one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def parser(doc):
    return argparse.ArgumentParser(description=doc, formatter_class=Formatter)


def add_data(parser):
    """Adds the options that a cache and the runs that use it must share."""
    add = parser.add_argument
    add("--teacher", type=file, help="GGUF file, instead of the wheel's SmolLM2")
    add("--text", type=file, help="UTF-8 text, instead of Python's reference")
    add("--length", type=integer(2), default=128, help="tokens per window")
    add("--windows", type=integer(1), help="train only on the first N")
    add("--held-out", type=integer(1), default=16, help="windows to hold out")


def make_folder(parser, path):
    try:  # check before the work, not after
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        parser.error(f"argument --output: cannot write there: {error}")


def error(expected, text):
    return argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def file(text):
    if not (path := Path(text)).is_file():
        raise error("a file", text)
    return path


def some(text):
    if not text.strip():
        raise error("some text", text)
    return text


def number(convert, accept, expected):
    def parse(text):
        try:
            if accept(value := convert(text)):
                return value
        except ValueError:
            pass
        raise error(expected, text)

    return parse


def integer(low):
    return number(int, lambda n: n >= low, f"an integer from {low}")


positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
share = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def divergence(text):
    """Parses `name` or `name:parameter=value,...`."""
    name, _, rest = text.partition(":")
    if name not in DIVERGENCES:
        raise error(f"one of {', '.join(DIVERGENCES)}", text)
    kind = DIVERGENCES[name]
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    values = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in types:
            known = ", ".join(types) or "no parameters"
            raise argparse.ArgumentTypeError(f"{name} has {known}, not {key!r}")
        try:
            values[key] = value == "true" if types[key] is bool else float(value)
        except ValueError:
            raise error(f"a number for {key}", text) from None
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise error(f"{name}:{field.name}=NUMBER", text)
    try:
        return kind(**values)
    except ValueError as why:
        raise argparse.ArgumentTypeError(f"{text!r}: {why}") from None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A number, or `linear:FROM:TO` or `cosine:FROM:TO` over all steps."""

    shape: str
    first: float
    last: float

    def over(self, steps):
        shapes = {
            "constant": optax.constant_schedule(1.0),
            "linear": optax.linear_schedule(1.0, 0.0, steps),
            "cosine": optax.cosine_decay_schedule(1.0, steps),
        }
        share = shapes[self.shape]
        return lambda step: self.last + (self.first - self.last) * share(step)


def schedule(value):
    """Makes the type of an option whose numbers have type `value`."""

    def parse(text):
        shape, *ends = text.split(":")
        if not ends:
            return Schedule("constant", value(text), value(text))
        if shape not in ("linear", "cosine") or len(ends) != 2:
            raise error("a number, linear:FROM:TO or cosine:FROM:TO", text)
        return Schedule(shape, *map(value, ends))

    return parse


def layers(text):
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise error("layers as 0,1,8", text) from None


def mesh(text):
    """Parses `data=4,model=2` into a dict; both axes are optional."""
    sizes = {"data": 1, "model": 1}
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in sizes or not size.isdecimal() or int(size) < 1:
            raise error("data=N,model=M", text)
        sizes[axis] = int(size)
    return sizes
