"""Shards tokens and vocabulary over a mesh of TPUs: memory and exchanges.

It needs no TPU: it compiles and runs nothing.
"""

import re

import numpy as np

from .harness import Cell, find, ratio, Result, Target
from .programs import Job
from .tpu import compile_all


TOKENS, HIDDEN, VOCAB = 32768, 4096, 262144  # for a whole mesh
MESHES = ((1, 1), (2, 2), (4, 4))  # devices for tokens × for the vocabulary
WAYS = ("jaxkl, jit", "plain JAX")
PODS = {"v5e:16x16": (64, 4), "v5p:16x16x16": (1024, 4)}

# Matches `%x = (f32[8]{0:T(256)}, f32[8]{0}) all-reduce(%y, %z), replica_groups=…`.
COLLECTIVE = re.compile(
    r" = (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(-start)?\("
)
CALLED = re.compile(
    r"(?:body|branch_computations|called_computations|calls|condition|to_apply)"
    r"=\{?(%[^\s,{}]+(?:, %[^\s,{}]+)*)"
)


def run(settings):
    tokens, hidden, vocab = TOKENS, HIDDEN, VOCAB
    if settings.smoke:
        tokens, hidden, vocab = 2048, 128, 65536
    cases = [("v5e:4x4", mesh, tokens, "jaxkl") for mesh in MESHES]
    cases += [("v5e:4x4", MESHES[-1], tokens, way) for way in WAYS]
    for topology, mesh in {} if settings.smoke else PODS.items():
        # A chip has as many tokens and columns as on 4 × 4.
        cases.append((topology, mesh, tokens // 4 * mesh[0], "jaxkl"))
    jobs = {topology: {} for topology, *_ in cases}
    for topology, mesh, tokens, way in cases:
        plan = "fast" if way.startswith("jaxkl") else None  # a chip alone would be lean
        job = Job(way, tokens, vocab, hidden, mesh=mesh, plan=plan)
        jobs[topology][name_of(topology, mesh, tokens, way)] = job
    rows = []
    for topology, named in jobs.items():
        for row in compile_all(topology, named):
            if "text" in row:
                row |= collectives(row.pop("text"), named[row["peer"]].mesh)
            rows.append(row)
    ours = [name_of(*case) for case in cases if case[-1] == "jaxkl"]
    return Result(rows, targets(rows, *ours))


def name_of(topology, mesh, tokens, way):
    return f"{topology.split(':')[0]} {mesh[0]}x{mesh[1]}, {tokens} tokens, {way}"


def targets(rows, one, some, full, *pods):
    """Makes targets from the names of jaxkl's rows: meshes in order, then pods."""
    temp = lambda peer, base: ratio(rows, "temp_bytes", peer, base)
    total, size = (
        find(rows, full).get(key) for key in ("total_bytes", "in_loop_bytes")
    )
    ours = [row for name in (one, some, full, *pods) if (row := find(rows, name))]
    steps = max((len(row["in_loop"]) for row in ours), default=None)
    exchanges = [text for row in ours for text in row["in_loop"] + row["outside"]]
    others = sum(not text.startswith("all-reduce") for text in exchanges)
    return [
        Target("4x4: arguments + outputs + temp, GB", total and total / 1e9, 16.0),
        Target("2x2: temp ÷ 1x1's", temp(some, one), 0.75),
        Target("4x4: temp ÷ 1x1's", temp(full, one), 0.5),
        *(Target(f"{name}: temp ÷ 4x4's", temp(name, full), 1.25) for name in pods),
        Target("exchanges a tile", steps, 3, "{:.0f}"),
        Target("4x4: KiB exchanged a tile", size and size / 2**10, 24.0),
        Target("exchanges but all-reduce", others if ours else None, 0, "{:.0f}"),
    ]


def collectives(text, mesh):
    """Finds the collectives of a compiled program, inside its loops and outside.

    `mesh` is the shape of the mesh. `in_loop_bytes` counts the arrays that one step of
    the loops exchanges.
    """
    found, called, loops = {}, {}, set()
    for line in text.splitlines():
        if line.endswith("{") and line.startswith(("%", "ENTRY")):
            name = re.search(r"%[^\s(]+", line)[0]
            found[name], called[name] = [], set()
        elif match := COLLECTIVE.search(line):
            found[name].append((*arrays(match), axes(line, mesh)))
        for names in CALLED.findall(line):
            called[name].update(names.split(", "))
        loops.update(re.findall(r"body=(%[^\s,{}]+)", line))
    inside = set()
    while loops:
        inside.add(name := loops.pop())
        loops |= called[name] - inside
    within = [x for name in found if name in inside for x in found[name]]
    outside = [x for name in found if name not in inside for x in found[name]]
    described = lambda found: [f"{what} over {along}" for what, _, along in found]
    return {
        "in_loop": described(within),
        "in_loop_bytes": sum(size for _, size, _ in within),
        "outside": described(outside),
    }


def arrays(match):
    """Returns the results of a collective, as text and in bytes."""
    types, kind, start = match.groups()
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", types)
    if start and kind != "all-reduce":  # operands, results, and extra scalars
        shapes = [shape for shape in shapes if shape[1]]
        shapes = shapes[len(shapes) // 2 :]
    text = " + ".join(f"{dtype}[{sizes}]" for dtype, sizes in shapes)
    bits = lambda dtype: int((re.findall(r"\d+", dtype) or [8])[0])
    count = lambda sizes: int(np.prod([int(n) for n in sizes.split(",") if n] or 1))
    return f"{kind} {text}", sum(bits(dtype) // 8 * count(n) for dtype, n in shapes)


def axes(line, mesh):
    """Returns the mesh axes of an exchange, from the first device group in a line.

    XLA writes groups in three forms. `{{0,4,8},…}` lists them. `[3,2]<=[2,3]T(1,0)` has
    3 groups of 2, from an array of shape [2, 3] of all device numbers, transposed. The
    third form is `mesh['axis_0'=2,'axis_1'=3] {'axis_1'}`.
    """
    names = ("tokens", "vocab")
    groups = re.search(r"(?:replica_groups|source_target_pairs)=(.*)", line)[1]
    if groups.startswith("mesh"):
        found = [names[int(i)] for i in re.findall(r"'axis_(\d)'[,}]", groups)]
    else:
        if groups.startswith("{"):
            ids = numbers(r"\{\{([\d,]+)", groups)
        else:
            sizes = numbers(r"<=\[([\d,]+)", groups)
            ids = np.arange(np.prod(sizes)).reshape(sizes)
            ids = ids.transpose(numbers(r"^[^ ]*T\(([\d,]+)", groups))
            ids = ids.reshape(numbers(r"\[([\d,]+)", groups))[0]
        places = zip(names, np.unravel_index(ids, mesh), strict=True)
        found = [name for name, at in places if len(set(at)) > 1]
    return " and ".join(found)


def numbers(pattern, text):
    match = re.search(pattern, text)
    return match and [int(n) for n in match[1].split(",")]


CELLS = [
    Cell(
        "tpu-sharded",
        f"Compiled for meshes of TPUs, tokens × vocabulary: heads of H {HIDDEN}, "
        f"V {VOCAB}, bf16, forward-kl: value and gradient to hidden and kernel; bytes "
        "of one chip, and what chips exchange at each step of a loop and outside it",
        run,
    ),
]
