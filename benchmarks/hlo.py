"""Reads the text of a program that XLA has optimised.

The text has computations, and each line of a computation is an operation:
`%name = result kind(%operand, …), calls=%computation, …`.
"""

import dataclasses
import math
import re
from functools import cached_property


# A type such as `bf16[8,128]{1,0:T(8,128)S(1)}`. S(1) is the chip's VMEM, not HBM.
ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
OPERATION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>\S+) = "
    r"(?P<result>\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|\S+) "
    r"(?P<kind>[a-z][\w-]*)\((?P<rest>.*)"
)
HEAD = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[^\s(]+) .*->.*\{$")
CALLED = re.compile(
    r"(?:branch_computations|calls|false_computation|to_apply|true_computation)"
    r"=\{?(%?[\w.-]+(?:, %[\w.-]+)*)"
)


@dataclasses.dataclass(frozen=True)
class Operation:
    name: str
    result: str
    kind: str
    rest: str  # the operands, and the attributes after them

    @cached_property
    def inside(self):
        """Returns the text between the brackets: operands, a number or a constant."""
        depth = 1
        for at, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                return self.rest[:at]
        return self.rest

    @cached_property
    def operands(self):
        return re.findall(r"%([\w.-]+)", self.inside)

    @cached_property
    def called(self):
        """Returns names of computations; those of a loop have names of their own."""
        names = CALLED.findall(self.rest[len(self.inside) :])
        return [name.lstrip("%") for x in names for name in x.split(", ")]

    def attribute(self, pattern):
        """Returns the group of a pattern in the attributes, or None."""
        match = re.search(pattern, self.rest)
        return match and match[1]


def bits(dtype):
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


def arrays(text):
    """Returns the dtype, the number of entries and the layout of each array."""
    return [
        (dtype, math.prod(int(n) for n in sizes.split(",") if n), layout or "")
        for dtype, sizes, layout in ARRAY.findall(text)
    ]


def entries(text):
    """Returns the number of entries of the first array."""
    return next((count for _, count, _ in arrays(text)), 0)


def size(text):
    """Returns the bytes of all arrays, wherever they are."""
    return sum(count * bits(dtype) // 8 for dtype, count, _ in arrays(text))


def size_in_hbm(text):
    return sum(
        count * bits(dtype) // 8
        for dtype, count, layout in arrays(text)
        if "S(" not in layout
    )


class Program:
    """Computations by name; each has its operations by name, in order."""

    def __init__(self, text):
        self.computations: dict[str, dict[str, Operation]] = {}
        self.entry = None
        operations = None
        for line in text.splitlines():
            if line[:1] not in (" ", "}", "") and (head := HEAD.match(line)):
                operations = self.computations[head["name"]] = {}
                if head["entry"]:
                    self.entry = head["name"]
            elif line.startswith("}"):
                operations = None
            elif operations is not None and (match := OPERATION.match(line)):
                operation = Operation(**match.groupdict())
                operations[operation.name] = operation
        if self.entry is None:
            raise ValueError("the text has no ENTRY computation")

    def within(self, operation):
        """Returns the operations of a fusion, with those of fusions within it."""
        found = []
        for name in operation.called if operation.kind == "fusion" else ():
            for inner in self.computations[name].values():
                found += [inner, *self.within(inner)]
        return found


def reads(text):
    """Counts the operations of a compiled program that take each argument, in order.

    Each operation is one pass over the argument. A fusion is one operation.
    """
    program = Program(text)
    source = {}  # names of arguments and their bitcasts -> argument number
    counts = {}
    for operation in program.computations[program.entry].values():
        if operation.kind == "parameter":
            source[operation.name] = int(operation.inside)
            counts[int(operation.inside)] = 0
            continue
        used = {source[x] for x in operation.operands if x in source}
        if operation.kind == "bitcast":
            if used:
                (source[operation.name],) = used
            continue
        for i in used:
            counts[i] += 1
    return [counts[i] for i in sorted(counts)]
