"""Checks the peers of a cell against float64, then times them in turns."""

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


TOLERANCE = 1e-4  # for a peer's value and gradients; float32 gives about 1e-6


@dataclasses.dataclass(frozen=True)
class Settings:
    rounds: int = 7
    smoke: bool = False  # tiny shapes, to test the harness itself


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound for a cell. The value is None if something it needs was missing."""

    what: str
    value: float | None
    bound: float
    form: str = "{:.2f}"

    @property
    def verdict(self):
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.bound else "MISSED"


@dataclasses.dataclass(frozen=True)
class Result:
    rows: list[dict[str, Any]]  # "peer" is a row's name, "state" is "ok" if it counts
    targets: list[Target]
    bases: tuple[str, ...] = ()  # the table shows ratios to these peers


@dataclasses.dataclass(frozen=True)
class Cell:
    name: str
    title: str
    run: Callable[[Settings], Result]


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to time: `run()` waits for its outputs and returns them."""

    run: Callable[[], Any]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    prepare: Callable[[], Work]
    expected: Sequence[Any] | None = None  # value and gradients, or None: no check
    optional: bool = True  # skipped, by name, if it cannot be prepared
    seen: Callable[[Any], Any] = lambda outputs: outputs  # selects the part to check


def jax_work(f, *args):
    """Compiles `f` for `args`, which are arguments and not constants."""
    start = time.perf_counter()
    compiled = jax.jit(f).lower(*args).compile()
    seconds = time.perf_counter() - start
    facts = {"compile_s": seconds} | memory_of(compiled)
    return Work(lambda: jax.block_until_ready(compiled(*args)), facts)


def memory_of(compiled):
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def relative_error(actual, expected):
    """Returns the relative error in norm, row by row to keep float64 copies small."""
    actual, expected = np.atleast_1d(np.asarray(actual)), np.atleast_1d(expected)
    if actual.shape != expected.shape:
        return float("inf")
    off = sum(
        np.sum(np.square(np.subtract(x, y, dtype=np.float64)))
        for x, y in zip(actual, expected, strict=True)
    )
    error = np.sqrt(off / np.sum(np.square(expected)))
    return float(error) if np.isfinite(error) else float("inf")


def prepared(peer):
    """Runs a peer once; returns its work and its row of the table."""
    row = {"peer": peer.name, "state": "ok", "required": not peer.optional}
    try:
        start = time.perf_counter()
        work = peer.prepare()
        outputs = work.run()
        row["first_run_s"] = time.perf_counter() - start
    except Exception as error:
        if not peer.optional:
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[0][:100]
        return None, row | {"state": "skipped", "reason": reason}
    row |= work.facts
    if peer.expected is not None:
        leaves = jax.tree.leaves(peer.seen(outputs))
        errors = [
            relative_error(x, y) for x, y in zip(leaves, peer.expected, strict=True)
        ]
        row["value_error"] = errors[0]
        if errors[1:]:
            row["gradient_error"] = max(errors[1:])
        if max(errors) > TOLERANCE:
            row["state"] = "WRONG"
    return work, row


def measure(peers, settings):
    """Returns rows of all peers, with the ratio of each time to each other time.

    A round runs every peer once, in a new random order. A time is the median over
    rounds. A ratio is the median of the ratios within rounds, so that a slow round does
    not distort it.
    """
    works, rows = {}, []
    for peer in peers:
        work, row = prepared(peer)
        rows.append(row)
        if work is not None:
            works[peer.name] = work
    times = {name: [] for name in works}
    order, shuffle = list(works), random.Random(0).shuffle
    for _ in range(settings.rounds):
        shuffle(order)
        for name in order:
            gc.collect()
            start = time.perf_counter()
            works[name].run()
            times[name].append(time.perf_counter() - start)
    for row in rows:
        if own := times.get(row["peer"]):
            row["ms"] = 1e3 * statistics.median(own)
            row["fastest_ms"] = 1e3 * min(own)
            row["ratios"] = {
                base: statistics.median(
                    x / y for x, y in zip(own, times[base], strict=True)
                )
                for base in times
                if find(rows, base)
            }
    return rows


def find(rows, peer):
    """Returns the row of a peer that ran and was right, or an empty one."""
    return next((r for r in rows if r["peer"] == peer and r["state"] == "ok"), {})


def time_ratio(rows, peer, base):
    """Returns a ratio of times, or None if a peer is missing or was not timed."""
    return find(rows, peer).get("ratios", {}).get(base)


def ratio(rows, key, peer, base):
    """Returns the ratio of one fact of two peers, or None if either is missing."""
    x, y = find(rows, peer).get(key), find(rows, base).get(key)
    return None if x is None or y is None else x / y


def bytes_alone(arrays, gradient):
    """Makes the minimum: read the arrays and, for a gradient, write a new one."""
    f = (lambda x, y: x - y) if gradient else (lambda x, y: jax.numpy.sum(x - y))
    return Peer(BYTES, lambda: jax_work(f, *arrays), optional=False)


BYTES = "reads and writes alone"
OTHERS = ("plain JAX", "optax", "ejkernel", "torch eager")


def against_peers(rows, compiled, others):
    """Bounds jaxkl's time against torch.compile and the fastest of the others."""
    ratios = {name: time_ratio(rows, "jaxkl", name) for name in OTHERS}
    present = {name: x for name, x in ratios.items() if x is not None}
    best = max(present, key=present.get, default=None)
    targets = [
        Target(f"time ÷ the best of the others ({best})", present.get(best), others)
    ]
    if compiled is not None:
        value = time_ratio(rows, "jaxkl", "torch.compile")
        targets.append(Target("time ÷ torch.compile", value, compiled))
    return targets
