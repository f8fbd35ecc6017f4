"""Computes how long a program would take on a TPU, from what its compiler says.

Nothing runs, and no TPU is needed. A TPU's core is statically scheduled: its compiler
decides which instructions form a bundle, and the core starts one bundle a cycle. The
compiler can write out the bundles of each operation. The time of an operation is the
largest of

- bundles × iterations ÷ clock (÷ 2 on v5p, where two cores are one device, and share
  the iterations),
- bytes read and written in HBM ÷ bandwidth,
- FLOPs of its matrix products ÷ the peak rate.

The time of a program is the sum over its operations, with the operations of a loop
multiplied by its trip count. A conditional counts as its slowest branch. The model lets
no two operations overlap, except that asynchronous copies are free. It counts a loop
inside an operation once: matrix products have such loops, and there FLOPs are the
bound. A scatter counts as a read and a write of the whole array. Therefore the model
compares programs that do the same work. It is not a stopwatch.

The grid of a Pallas kernel (`tpu_custom_call`) is not in the program's text. Pass the
number of its steps in `grids`; otherwise it counts as one step and as unscheduled.
"""

import collections
import dataclasses
import math
import re

from . import hlo


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates of a device, per second."""

    clock: float
    hbm_bytes: float
    flops: float  # in bf16
    cores: int = 1  # that share each operation


CHIPS = {
    "v4": Chip(1.05e9, 614e9, 137.5e12),  # a device is one of the chip's two cores
    "v5e": Chip(1.5e9, 819e9, 197e12),
    "v5p": Chip(1.75e9, 2765e9, 459e12, cores=2),
    "v6e": Chip(1.75e9, 1640e9, 918e12),
}
# libtpu reads these options once, when a process loads it. Without the expression it
# would write out each of some 70 passes, which takes twice as long as to compile.
FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=final_bundles"
)
# The name of an operation may contain hyphens.
BUNDLES = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
BUNDLE = re.compile(r" *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})?:? *(>?)")
FREE = {
    "after-all",
    "async-done",
    "async-start",
    "async-update",
    "bitcast",
    "call-done",
    "constant",
    "copy-done",
    "copy-start",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "slice-done",
    "slice-start",
    "tuple",
}
SLICES = ("dynamic-slice", "gather", "slice")


@dataclasses.dataclass(frozen=True)
class Timed:
    """An operation and the time of all its runs, in ms."""

    name: str
    where: str  # the operation of JAX that it was made from
    times: int
    ms: float
    bundles_ms: float | None  # None: there is no schedule
    hbm_ms: float
    flops_ms: float


def read_bundles(folder):
    """Returns `{operation: (bundles in its loop, bundles outside)}` of a dump."""
    found = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime):
        if match := BUNDLES.fullmatch(path.name):
            text = path.read_text(encoding="utf-8", errors="replace")
            found[match[1]] = count_bundles(text)
    return found


def count_bundles(text):
    """Counts the lines that are bundles, such as `0xc LB: > { … }`.

    The sign `>` marks the loop.
    """
    matches = [match for line in text.splitlines() if (match := BUNDLE.match(line))]
    inside = sum(match[1] == ">" for match in matches)
    return inside, len(matches) - inside


def time_program(text, bundles, chip, grids=None):
    """Returns the operations of a program and their times, in order."""
    return Schedule(hlo.Program(text), bundles, chip, grids or {}).computation()


class Schedule:
    def __init__(self, program, bundles, chip, grids):
        self.program, self.bundles, self.chip = program, bundles, chip
        self.grids = grids
        # The compiler writes out only one of several equal operations.
        self.of_equal = {
            self.signature(operation, operations): bundles[operation.name]
            for operations in program.computations.values()
            for operation in operations.values()
            if operation.name in bundles
        }

    def computation(self, name=None, times=1):
        operations = self.program.computations[name or self.program.entry]
        found = []
        for operation in operations.values():
            if operation.kind == "while":
                body = operation.attribute(r"body=%?([\w.-]+)")
                found += self.computation(body, times * self.trip_count(operation))
            elif operation.kind in ("call", "call-start", "conditional"):
                branches = [self.computation(x, times) for x in operation.called]
                found += max(branches, key=total, default=[])
            elif not is_free(operation):
                found.append(self.operation(operation, operations, times))
        return found

    def trip_count(self, loop):
        """Returns the largest integer that the condition of a loop compares with."""
        condition = loop.attribute(r"condition=%?([\w.-]+)")
        operations = list(self.program.computations[condition].values())
        for operation in list(operations):
            operations += self.program.within(operation)
        bounds = [
            int(x.inside)
            for x in operations
            if x.kind == "constant" and x.result.startswith("s32[]")
        ]
        if not bounds:
            raise ValueError(f"the trip count of {loop.name} is not in the program")
        return max(bounds)

    def operation(self, operation, operations, times):
        chip = self.chip
        hbm = self.moved(operation, operations) / chip.hbm_bytes
        flops = self.flops(operation, operations) / chip.flops
        scheduled = self.scheduled(operation, operations)
        ms = 1e3 * times
        return Timed(
            name=operation.name,
            where=operation.attribute(r'op_name="([^"]*)"') or "",
            times=times,
            ms=ms * max(scheduled or 0, hbm, flops),
            bundles_ms=None if scheduled is None else ms * scheduled,
            hbm_ms=ms * hbm,
            flops_ms=ms * flops,
        )

    def scheduled(self, operation, operations):
        """Returns the seconds that the bundles of an operation take, or None."""
        bundles = self.bundles.get(operation.name)
        if bundles is None:
            bundles = self.of_equal.get(self.signature(operation, operations))
        iterations = self.grids.get(operation.name)
        if iterations is None and "tpu_custom_call" not in operation.rest:
            iterations = math.prod(int(n) for n in iteration_bounds(operation))
        if bundles is None or iterations is None:
            return None
        inside, outside = bundles
        return (inside * iterations + outside) / (self.chip.clock * self.chip.cores)

    def signature(self, operation, operations):
        """Returns what equal operations have in common."""
        results = [operations[x].result for x in operation.operands if x in operations]
        inner = [(x.kind, x.result) for x in self.program.within(operation)]
        types = (operation.kind, operation.result, *results)
        return (*types, *inner, *iteration_bounds(operation))

    def flops(self, operation, operations):
        inner = self.program.within(operation)
        results = {x.name: x.result for x in (*operations.values(), *inner)}
        total = 0.0
        for x in inner or [operation]:
            if x.kind in ("convolution", "dot"):
                # m × k, k × n and m × n entries
                sizes = [hlo.entries(results[name]) for name in x.operands[:2]]
                total += 2 * math.sqrt(math.prod(sizes) * hlo.entries(x.result))
        return total

    def moved(self, operation, operations):
        """Counts the bytes that an operation reads and writes in HBM.

        Of an array that it slices, it reads the slice. Of one that it updates in place,
        it writes the update.
        """
        results = [operations[x].result for x in operation.operands if x in operations]
        if operation.kind == "dynamic-update-slice":
            return 2 * hlo.size_in_hbm(results[1])
        if operation.kind == "dynamic-slice":
            return 2 * hlo.size_in_hbm(operation.result)
        written, parts = hlo.size_in_hbm(operation.result), {}
        for name in operation.called if operation.kind == "fusion" else ():
            written += self.saved(name)
            parts |= self.parts(name)
        whole = [hlo.size_in_hbm(x) for x in results]
        read = sum(min(x, parts.get(i, x)) for i, x in enumerate(whole))
        return max(written, 0) + read

    def saved(self, name):
        """Returns minus the bytes that updates in place leave as they are."""
        operations = self.program.computations[name]
        return sum(
            hlo.size_in_hbm(operations[x.operands[1]].result)
            - hlo.size_in_hbm(x.result)
            for x in operations.values()
            if x.kind == "dynamic-update-slice"
        )

    def parts(self, name):
        """Returns the bytes that a fusion reads of each of its parameters."""
        operations = self.program.computations[name]
        number = {
            x.name: int(x.inside) for x in operations.values() if x.kind == "parameter"
        }
        read = collections.Counter()
        for x in operations.values():
            nested = {}
            for inner in x.called if x.kind == "fusion" else ():
                nested |= self.parts(inner)
            for place, operand in enumerate(x.operands):
                if operand not in number:
                    continue
                amount = hlo.size(operations[operand].result)
                if place == 0 and x.kind in SLICES:
                    amount = hlo.size(x.result)
                elif place == 0 and x.kind == "dynamic-update-slice":
                    amount = 0
                read[number[operand]] += nested.get(place, amount)
        return dict(read)


def iteration_bounds(operation):
    bounds = operation.attribute(r'iteration_bounds":\[([^\]]*)\]') or ""
    return re.findall(r"\d+", bounds)


def is_free(operation):
    if operation.kind == "custom-call":
        return "tpu_custom_call" not in operation.rest
    return operation.kind in FREE


def total(operations):
    return sum(x.ms for x in operations)


def summary(text, bundles, chip, grids=None, most=5):
    """Returns the time of a program in ms, and its longest operations.

    It also returns the names of operations without a schedule, which only their bytes
    and FLOPs bound, and the part of the time that these take.
    """
    operations = time_program(text, bundles, chip, grids)
    longest = sorted(operations, key=lambda x: -x.ms)[:most]
    unscheduled = [x for x in operations if x.bundles_ms is None]
    return {
        "schedule_ms": total(operations),
        "hbm_ms": sum(x.hbm_ms for x in operations),
        "flops_ms": sum(x.flops_ms for x in operations),
        "longest": [dataclasses.asdict(x) for x in longest],
        "unscheduled_ms": total(unscheduled),
        "unscheduled": [x.name for x in unscheduled],
    }
