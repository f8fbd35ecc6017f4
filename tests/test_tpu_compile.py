"""The program that the TPU compiler makes of a sharded loss: what devices exchange."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from .tpu_programs import CASES, PLAIN, SHARDED


TIMEOUT = 600
# The module compiles once, for two minutes: `make test-slow` splits no file.
pytestmark = [pytest.mark.slow, pytest.mark.newest]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    assert importlib.util.find_spec("libtpu"), "`make test` installs libtpu"
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LOG_DIR": str(tmp_path_factory.mktemp("logs")),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    program = [sys.executable, "-m", "tests.tpu_programs"]
    done = subprocess.run(
        program, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return {name: facts for line in lines for name, facts in json.loads(line).items()}


def split(programs, name):
    """Collectives in the loop over tiles, and outside it."""
    found = programs[name]["collectives"]
    inside = [tuple(x[1:]) for x in found if x[0]]
    return inside, [tuple(x[1:]) for x in found if not x[0]]


def floats(sizes):
    return sum(math.prod(size) for size in sizes)


@pytest.mark.parametrize("name", [x for x in CASES if CASES[x][-1] == SHARDED])
def test_three_small_all_reduces_a_tile(programs, name):
    inside, outside = split(programs, name)
    if name.startswith("logits"):  # XLA fuses all: there are no tiles
        inside = [x for x in outside if floats(x[1]) > 1]
    assert [op for op, _ in inside] == ["all-reduce"] * 3
    _, shape, tokens, _, _, tile, _ = CASES[name]
    rows = tokens // shape[0] if name.startswith("logits") else tile or 1024
    # Maxima, sums of exponentials, and their difference, of both models; the loss. With
    # labels, at a temperature: the sum at temperature 1; of the label, its term and the
    # sum of the others, which has the digits of a nearly certain one; of smoothing, its
    # term and the number of columns that are not -inf.
    most = 11 if name.startswith("labels") else 6
    assert sum(floats(sizes) for _, sizes in inside) <= most * rows


# All-reduces of a tile, and numbers of each of its tokens in them.
EXCHANGED = {
    "function 2x2": (3, 6),
    # The mixture has sums of slopes.
    "mixture 2x2": (3, 9),
    # The logits of the 64 columns of a list, of which each device then has all; the
    # loss. Nothing else of the row is needed.
    "conditional 2x2": (2, 65),
    # Without a teacher: the maximum; sums of exponentials with those of the label. The
    # backward pass of log-probabilities makes the logits again, and exchanges nothing;
    # the entropy has one more sum.
    "labels 2x2": (2, 5),
    "tokens 2x2": (2, 6),
}


@pytest.mark.parametrize("name", EXCHANGED)
def test_a_tile_exchanges_a_few_numbers_a_token(programs, name):
    inside, _ = split(programs, name)
    count, most = EXCHANGED[name]
    assert [op for op, _ in inside] == ["all-reduce"] * count
    tile = CASES[name][5]
    assert 0 < sum(floats(sizes) for _, sizes in inside) <= most * tile


@pytest.mark.parametrize("name", [x for x in CASES if CASES[x][3]])
def test_gradients_are_reduced_once_and_nothing_is_gathered(programs, name):
    _, shape, tokens, hidden, vocab, tile, form = CASES[name]
    inside, outside = split(programs, name)
    d_hidden = [tokens // shape[0], hidden]
    d_kernel = [hidden, vocab // shape[1]]
    reduced = [size for op, sizes in outside if op == "all-reduce" for size in sizes]
    assert reduced.count(d_kernel) == 1
    if form != PLAIN:  # where the partitioner sums hidden states a tile at a time
        assert reduced.count(d_hidden) == 1
        assert {op for op, _ in inside + outside} == {"all-reduce"}
    for op, sizes in inside:
        for size in sizes:
            assert not {vocab, vocab // shape[1]} & set(size), (op, size)
    for op, sizes in outside:
        for size in sizes:
            wide = {vocab, vocab // shape[1]} & set(size)
            assert not wide or (op == "all-reduce" and size == d_kernel), (op, size)


def test_plain_jit_moves_no_token(programs):
    """Each device has as many tokens of a tile as any other, none of them padding."""
    inside, outside = split(programs, "plain jit 4x1")
    _, _, _, hidden, vocab, *_ = CASES["plain jit 4x1"]
    assert not inside and {op for op, _ in outside} == {"all-reduce"}
    sizes = [size for _, sizes in outside for size in sizes]
    assert sorted(sizes) == [[], [hidden, vocab]]  # the loss, and `d kernel`


def test_a_large_head_fits(programs):
    """32768 tokens, H 4096, V 262144, bf16: on 16 chips of 16 GB."""
    assert programs["large 4x4"]["bytes"] < 16e9


@pytest.mark.parametrize("name, share", [("logits alone", 0.05), ("list alone", 0.25)])
def test_nothing_of_the_size_of_logits_is_kept(programs, name, share):
    """Beside a list, float32 arrays of a tile; of all tokens, one would be twice it."""
    _, _, tokens, _, vocab, *_ = CASES[name]
    bytes_of_logits = tokens * vocab * 2  # in bf16
    assert programs[name]["temporary"] < share * bytes_of_logits
