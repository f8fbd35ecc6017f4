"""How a loss is walked: tiles, their order, and what is computed twice.

A plan depends on the platform and on the `Workload`, and on nothing else.
"""

import dataclasses
import math
from typing import Any, Literal

import jax

from .._source.base import Kind, Source
from .._util.compat import is_explicitly_sharded, many_devices, varying_axes
from .._util.trees import partition, select
from .operands import Operands, PlanName, Spec


Platform = Literal["cpu", "accelerator"]
Order = Literal["blocks", "strided"]

_MIB = 2**20
_MAX_TILE = 1024  # tokens: enough for a matrix product to run at full speed
_LEAST_IN_PART = 8  # tiles
_ONE_PASS_BYTES = 256 * _MIB  # of a tile's logits
_MOST_BYTES = 4 * 2**30  # of the fast plan: a quarter of the memory of a TPU v5e


@dataclasses.dataclass(frozen=True)
class Plan:
    tile: int | None  # tokens at a time; None: all of them at once
    order: Order  # which tokens are in a tile, see `orders`
    # Whether slopes are evaluated twice, rather than kept until their sum is known.
    recompute: bool
    # Tokens of a part, whose tiles leave what the gradient of a head needs, for one
    # product over the part; None: each tile makes its own product. See `walk`.
    part: int | None = None
    # Whether a barrier keeps XLA from fusing the `d_outputs` of a tile with their write
    # to a part: then they are one pass over the logits with the terms, and are held for
    # a moment before they are where the part has them.
    barrier_outputs: bool = False
    # Columns at a time, of all tokens, in place of tiles of tokens. See `tile`.
    columns: int | None = None


@dataclasses.dataclass(frozen=True)
class Workload:
    """All that a plan depends on, but for the platform."""

    tokens: Any  # on this device; an int, or a symbolic size of `jax.export`
    columns: int  # of a tile
    student: Kind = "logits"
    teacher: Kind | None = "logits"  # None: there is none
    itemsize: int = 4  # bytes of a logit in a tile
    half_logits: bool = False  # whether logits that are arguments have 16 bits
    # Tokens whose `d_outputs` are as large as the float32 sum of a head's gradient.
    tokens_per_sum: int = 0
    sum_bytes: int = 0  # of these sums, if their gradients are asked for
    # Whether a block of columns can be made alone, as the lean plan does.
    makes_blocks: bool = True
    many_devices: bool = False  # whether the program may run on several devices
    # How tokens are spread over devices: by XLA's partitioner, by a `shard_map` around
    # the loss, so that all tokens are local, or as their types say.
    sharding: Literal["auto", "manual", "explicit"] = "auto"
    tile: int | None = None  # the user's choice
    plan: PlanName | None = None  # likewise

    @property
    def kinds(self) -> tuple[Kind | None, ...]:
        return self.student, self.teacher

    @property
    def is_dense(self) -> bool:
        """Whether all logits are arguments."""
        return self.student == "logits" and self.teacher in ("logits", None)

    @property
    def models(self) -> int:
        return 1 if self.teacher is None else 2


def workload(spec: Spec, operands: Operands, asked: Operands) -> Workload:
    """That of a loss; `asked` is that of `walk`."""
    sources = operands.sources
    student, teacher, *_ = (*(x.kind for x in sources), None)
    logits = [x.vocab_array for x in sources if x.kind == "logits"]
    sharding = "auto"
    if any(map(is_explicitly_sharded, jax.tree.leaves(operands))):
        sharding = "explicit"
    elif varying_axes(operands.per_token):
        sharding = "manual"
    return Workload(
        operands.tokens,
        spec.vocab.width,
        student,
        teacher,
        itemsize=spec.dtype.itemsize,
        half_logits=any(x.dtype.itemsize == 2 for x in logits),
        tokens_per_sum=_tokens_per_sum(spec, operands, asked),
        sum_bytes=_sum_bytes(spec, operands, asked),
        makes_blocks=all(x.makes_blocks for x in sources),
        many_devices=many_devices(),
        sharding=sharding,
        tile=spec.tile,
        plan=spec.plan,
    )


def _tokens_per_sum(spec: Spec, operands: Operands, asked: Operands) -> int:
    """It is 0 where no sum is asked for, or tiles are better pulled back one by one."""
    for source, of_source in zip(operands.sources, asked.sources, strict=True):
        sum_bytes = _sum_bytes(spec, source, of_source)
        if sum_bytes:
            row_bytes = spec.vocab.width * source.output_dtype(spec.dtype).itemsize
            at_once = source.pulls_back_at_once(of_source)
            return sum_bytes // row_bytes if at_once else 0
    return 0


def _sum_bytes(spec: Spec, x: Source | Operands, asked: Any) -> int:
    of_shared, _ = partition(x.shared_flags(), asked)
    sizes = [x.size for x in jax.tree.leaves(select(of_shared, x))]
    return sum(sizes) * spec.dtype.itemsize


def plan(platform: Platform, work: Workload) -> Plan:
    """The plan of a loss.

    A tile that the user chose changes the size of tiles. The plan is then that of an
    automatic choice of this size.
    """
    lean = Plan(None, "blocks", False, columns=_columns(platform, work))
    if "head" not in work.kinds:
        return _fast_plan(platform, work)
    if work.plan == "lean":
        return lean
    fast = _fast_plan(platform, work)
    is_free = work.makes_blocks and work.plan is None and work.tile is None
    fits = fast.tile is None or _fits(fast.tile, fast.part, work)
    return lean if platform == "accelerator" and is_free and not fits else fast


def _fast_plan(platform: Platform, work: Workload) -> Plan:
    tile = _tile(platform, work)
    if tile is not None and tile >= work.tokens:
        tile = None
    # Dense logits are already in memory: recompute slopes rather than store a
    # logits-sized array. A tile that stays in a CPU's cache may keep its slopes.
    recompute = platform == "accelerator" or (work.is_dense and tile is None)
    recompute &= work.teacher is not None  # the student alone has no slopes
    part, barrier_outputs = None, False
    if tile is not None and platform == "accelerator":
        part = _part(tile, work)
        # The student alone has its terms from the sums, and needs no barrier.
        barrier_outputs = part is not None and work.teacher is not None
        barrier_outputs &= _tile_bytes(tile, work) <= _ONE_PASS_BYTES
    return Plan(tile, _order(work), recompute, part, barrier_outputs)


def _fits(tile: int, part: int | None, work: Workload) -> bool:
    """Whether a fast plan is within its budget: the models' logits of a tile, what a
    part leaves, and sums of gradients over parts or tiles."""
    if work.sharding == "auto" and work.many_devices:
        return True  # XLA's partitioner may spread the tokens
    bytes_held = work.models * _tile_bytes(tile, work)
    part = min(part or 0, work.tokens)
    if part:
        bytes_held += part * work.sum_bytes // work.tokens_per_sum
    if part < work.tokens:
        bytes_held += work.sum_bytes
    return bytes_held <= _MOST_BYTES


def _tile_bytes(tile: int, work: Workload) -> int:
    return tile * work.columns * work.itemsize


def _columns(platform: Platform, work: Workload) -> int:
    # A TPU's compiler keeps a block of 64 MiB in the vector memory.
    block_bytes = (64 if platform == "accelerator" else 32) * _MIB
    tokens = work.tokens if isinstance(work.tokens, int) else 8192
    columns = block_bytes // (max(tokens, 1) * work.itemsize)
    return max(columns // 128, 1) * 128


def _part(tile: int, work: Workload) -> int | None:
    """Tokens of a part: its tiles leave no more than the sum that it replaces holds.

    All parts have the same number of tiles, if one near the largest allows for it. They
    are smaller if the plan fits only so. For several parts of few tiles it is None:
    they take as long as a sum over tiles (by the TPU compiler's schedule, at a hidden
    size of 1024) and hold both.
    """
    if work.tokens_per_sum == 0:
        return None
    tiles, most = (-(-n // tile) for n in (work.tokens, work.tokens_per_sum))
    parts = -(-tiles // most)
    if parts == 1:
        return tiles * tile
    even = [n for n in range(parts, tiles + 1) if tiles % n == 0]
    near = [n for n in even if n <= 2 * parts]
    counts = [-(-tiles // n) for n in (*near, parts, *even)]
    sizes = [n * tile for n in counts if n >= _LEAST_IN_PART]
    fitting = [size for size in sizes if _fits(tile, size, work)]
    return next(iter((*fitting, *sizes)), None)


def _tile(platform: Platform, work: Workload) -> int | None:
    if work.sharding == "explicit" or not isinstance(work.tokens, int):
        # Types that hold a sharding do not allow for slices. A symbolic number of
        # tokens, in `jax.export`, has no number of tiles.
        return None
    if work.tile is not None:
        return work.tile
    if platform == "accelerator":
        if work.is_dense:
            return None  # XLA fuses the loss into passes over the logits
        if "head" not in work.kinds:
            # A list's entries are spread over a tile, which does not fuse: it is so
            # small that a TPU's compiler keeps all that is made of it in the vector
            # memory. A larger one takes 1.5 to 2.4 times as long.
            return _tile_of_bytes(32 * _MIB, work)
        # Each tile of a head reads the whole kernel. At a chip's published rates that
        # takes as long as the products of 240 tokens (v5e) to 560 (v6e).
        return _tile_of_bytes(192 * _MIB, work, least=384)
    if "head" in work.kinds:
        return _tile_of_bytes(32 * _MIB, work)
    if work.half_logits:
        # XLA's CPU compiler widens bfloat16 arrays before it slices them, the whole
        # array at every step of a loop.
        return None
    return _tile_of_bytes(2 * _MIB, work)  # it stays in cache


def _order(work: Workload) -> Order:
    """Strided, so that a token axis that the partitioner has sharded stays sharded
    inside each tile; but blocks inside `shard_map`, where tokens are local, and on one
    device for logits, which strides would copy."""
    if work.sharding == "manual":
        return "blocks"
    has_logits = "logits" in work.kinds
    return "blocks" if has_logits and not work.many_devices else "strided"


def _tile_of_bytes(tile_bytes: int, work: Workload, least: int = 1) -> int:
    rows = max(tile_bytes // (work.columns * work.itemsize), least)
    near = min(rows // 8 * 8 or rows, _MAX_TILE)
    return tile_size(work.tokens, near, least)


def tile_size(tokens: int, near: int, least: int = 1) -> int:
    """A size near `near` that divides `tokens` if there is one, else one that almost
    does: the rest is padding, which copies, or tokens that are taken twice.

    Of the divisors we prefer multiples of a power of two: most often that is the number
    of devices that the tokens are spread over, and a tile that it does not divide would
    move tokens between them.
    """
    lowest = max(near * 2 // 3 + 1, least * 7 // 8)
    octave = range(lowest, min(near * 4 // 3, _MAX_TILE) + 1)
    if divisors := [tile for tile in octave if tokens % tile == 0]:
        return max(divisors, key=lambda tile: (math.gcd(tile, 16), tile))
    tile = -(-tokens // -(-tokens // near))
    return min(-(-tile // 8) * 8, near)
