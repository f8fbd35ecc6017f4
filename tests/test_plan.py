"""The plan of a loss: tiles, their order, and what is computed twice."""

import dataclasses
import itertools

import pytest

from jaxkl._engine.plan import Plan, plan, tile_size, Workload


HIDDEN = 4096
# In bfloat16, 2 HIDDEN tokens leave as much as a float32 sum of `d kernel`.
HEADS = dict(student="head", teacher="head", tokens_per_sum=2 * HIDDEN)
LISTED = dict(teacher="list")
VOCAB = 128256


@pytest.mark.parametrize(
    "platform, work, expected",
    [
        # XLA fuses dense logits into passes over them; a CPU has tiles in its cache.
        ("accelerator", {}, Plan(None, "blocks", True)),
        ("cpu", {}, Plan(4, "blocks", False)),
        ("cpu", dict(half_logits=True), Plan(None, "blocks", True)),
        ("cpu", dict(many_devices=True), Plan(4, "strided", False)),
        # 32 and 192 MiB of logits, and at least some 384 tokens.
        ("cpu", HEADS, Plan(64, "strided", False)),
        ("cpu", dict(HEADS, columns=32768), Plan(256, "strided", False)),
        ("accelerator", HEADS, Plan(512, "strided", True, 8192, True)),
        (
            "accelerator",
            dict(HEADS, columns=32768),
            Plan(1024, "strided", True, 8192, True),
        ),
        # The outputs of a tile are held beside its logits if these are not too large.
        ("accelerator", dict(HEADS, itemsize=8), Plan(512, "strided", True, 8192)),
        # Inside `shard_map` tokens are local.
        (
            "accelerator",
            dict(HEADS, sharding="manual"),
            Plan(512, "blocks", True, 8192, True),
        ),
        ("cpu", dict(sharding="manual", many_devices=True), Plan(4, "blocks", False)),
        # One head is enough; of logits, strides would be a copy.
        (
            "accelerator",
            dict(HEADS, teacher="logits"),
            Plan(512, "blocks", True, 8192, True),
        ),
        ("cpu", dict(student="head", many_devices=True), Plan(64, "strided", False)),
        # A list beside logits: 32 MiB, which a TPU has in its vector memory.
        ("accelerator", LISTED, Plan(64, "blocks", True)),
        ("cpu", LISTED, Plan(4, "blocks", False)),
        ("cpu", dict(LISTED, half_logits=True), Plan(None, "blocks", False)),
        # A few tokens are one tile.
        ("cpu", dict(tokens=3), Plan(None, "blocks", True)),
        ("accelerator", dict(HEADS, tokens=300), Plan(None, "strided", True)),
        # Neither a symbolic number of tokens nor a sharding in the types can be sliced.
        ("cpu", dict(tokens="symbolic"), Plan(None, "blocks", True)),
        ("accelerator", dict(HEADS, tokens="b", tile=8), Plan(None, "strided", True)),
        ("cpu", dict(sharding="explicit", tile=8), Plan(None, "blocks", True)),
    ],
)
def test_each_kind(platform, work, expected):
    work = Workload(**dict(tokens=8192, columns=VOCAB) | work)
    assert plan(platform, work) == expected


@pytest.mark.parametrize("platform", ["cpu", "accelerator"])
def test_a_tile_of_the_user_changes_the_size_and_nothing_else(platform):
    tiled, flags = 0, (False, True)
    students, teachers = ("logits", "head"), ("logits", "head", "list")
    for student, teacher, sharding, half, many in itertools.product(
        students, teachers, ("auto", "manual"), flags, flags
    ):
        per_sum = 8192 if "head" in (student, teacher) else 0
        more = dict(half_logits=half, many_devices=many, tokens_per_sum=per_sum)
        work = Workload(8192, VOCAB, student, teacher, sharding=sharding, **more)
        automatic = plan(platform, work)
        if automatic.tile is None:
            continue
        for tile in (1, 7, automatic.tile, 4096, 8191):
            chosen = plan(platform, dataclasses.replace(work, tile=tile))
            assert (chosen.part is None) == (automatic.part is None)
            depend = dict(part=chosen.part, barrier_outputs=chosen.barrier_outputs)
            assert chosen == dataclasses.replace(automatic, tile=tile, **depend)
            assert tile != automatic.tile or chosen == automatic
            tiled += 1
        whole = plan(platform, dataclasses.replace(work, tile=8192))
        assert whole.tile is None and whole.order == automatic.order
    assert tiled >= 100


@pytest.mark.parametrize(
    "tokens, tokens_per_sum, tile, part",
    [
        (8192, 8192, 512, 8192),
        (8192, 7680, 512, 4096),  # two parts of eight tiles
        (8192, 3584, 512, None),  # parts of seven tiles are too small
        (8192, 100, 512, None),
        (2048, 2048, 512, 2048),  # one part may have few
        (8191, 8192, 392, 8232),  # a prime number of tokens, in 21 tiles
        (8191, 5000, 392, 11 * 392),  # 2 parts of 11 and 10 tiles; 3 of 7 are too small
        (16384, 5000, 512, 8 * 512),  # 4 parts of 8 tiles
        (17 * 512, 8192, 512, 9 * 512),  # 17 tiles: parts of 9, and the last has 8
        (1000, 8192, 300, 1200),
    ],
)
def test_parts_are_no_larger_than_the_sum_they_replace(
    tokens, tokens_per_sum, tile, part
):
    work = Workload(tokens, VOCAB, **HEADS | dict(tokens_per_sum=tokens_per_sum))
    chosen = plan("accelerator", dataclasses.replace(work, tile=tile))
    assert (chosen.tile, chosen.part) == (tile, part)
    assert part is None or (part % tile == 0 and part - tile < tokens_per_sum)


SUM = dict(sum_bytes=HIDDEN * VOCAB * 4)  # of one head


@pytest.mark.parametrize(
    "work, is_lean",
    [
        (SUM, False),  # 2 GiB
        (dict(SUM, tokens=16384), False),  # four parts, as two and their sum do not fit
        (dict(SUM, tokens=31 * 512), True),  # parts of 16 and 15 tiles
        (dict(SUM, sum_bytes=2 * SUM["sum_bytes"]), True),  # of both heads
        (dict(SUM, sum_bytes=4 * SUM["sum_bytes"], tokens_per_sum=8 * HIDDEN), False),
        (dict(tokens=65536), False),  # frozen heads
        (dict(columns=2**21), True),  # tiles that are large themselves
        (dict(SUM, tokens=31 * 512, many_devices=True), False),  # spread, perhaps
        (dict(SUM, tokens=31 * 512, many_devices=True, sharding="manual"), True),
        (dict(SUM, tokens=31 * 512, plan="fast"), False),
        (dict(SUM, tokens=31 * 512, tile=512), False),
        (dict(SUM, tokens="symbolic"), False),
        (dict(plan="lean", tokens="symbolic"), True),
        (dict(plan="lean", teacher="logits"), True),
        (dict(plan="lean", teacher="logits", student="logits"), False),
    ],
)
def test_the_lean_plan_is_for_heads_that_would_hold_more_than_4_gib(work, is_lean):
    work = Workload(**dict(tokens=8192, columns=VOCAB) | HEADS | work)
    assert (plan("accelerator", work).columns is not None) == is_lean
    # A CPU has it only on request.
    assert (plan("cpu", work).columns is not None) == (is_lean and work.plan == "lean")


def test_a_function_is_never_lean():
    work = Workload(31 * 512, VOCAB, **HEADS | SUM)
    assert plan("accelerator", work).columns is not None
    whole = plan("accelerator", dataclasses.replace(work, makes_blocks=False))
    assert whole.columns is None and whole.tile is not None


def test_parts_shrink_until_they_fit():
    work = Workload(16384, VOCAB, **HEADS | SUM)
    assert plan("accelerator", work).part == 4096
    # Their size is not known to matter where tokens may be spread.
    work = dataclasses.replace(work, many_devices=True)
    assert plan("accelerator", work).part == 8192


@pytest.mark.parametrize("tokens", [1024, 4096, 6144, 8192, 15 * 512, 32768])
@pytest.mark.parametrize("near", [1, 5, 48, 65, 384, 392, 770, 1024])
def test_tiles_that_devices_share_evenly(tokens, near):
    tile = tile_size(tokens, near)
    assert 2 / 3 * near < tile <= min(4 / 3 * near, 1024)
    assert tokens % tile == 0
    assert tile % 16 == 0 or tile < 16


@pytest.mark.parametrize(
    "tokens, tile",
    [
        (16 * 2047, 368),
        (8000, 400),  # a multiple of 16; 500 is none
        (8184, 372),  # 264, a multiple of 8, would cost time
        (8191, 392),  # a prime number
    ],
)
def test_tiles_of_heads_on_accelerators(tokens, tile):
    assert tile_size(tokens, 392, 384) == tile
