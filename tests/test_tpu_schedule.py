"""The time that the benchmarks compute from a TPU compiler's schedule."""

import dataclasses
import importlib.util

import pytest

from benchmarks import hlo, schedule


# ms are bundles, or kilobytes
CHIP = schedule.Chip(clock=1e3, hbm_bytes=1e6, flops=1e9)

# Four steps of a loop, each of which adds a row of `x` to a sum in the chip's VMEM.
LOOP = """\
HloModule jit_f, entry_computation_layout={(f32[4,250]{1,0})->f32[250]{0}}

%fused (p.0: f32[4,250], p.1: f32[250], p.2: s32[]) -> f32[250] {
  %p.0 = f32[4,250]{1,0:T(8,128)} parameter(0)
  %p.2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %row = f32[1,250]{1,0:T(8,128)} dynamic-slice(%p.0, %p.2, %zero)
  %p.1 = f32[250]{0:T(256)} parameter(1)
  %flat = f32[250]{0:T(256)} bitcast(%row)
  ROOT %sum = f32[250]{0:T(256)} add(%p.1, %flat)
}

%body (state: STATE) -> STATE {
  %state = STATE parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %total = f32[250]{0:T(256)S(1)} get-tuple-element(%state), index=1
  %x = f32[4,250]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %add-row = f32[250]{0:T(256)S(1)} fusion(%x, %total, %i), kind=kLoop, WHAT
  ROOT %next = STATE tuple(%i, %add-row, %x)
}

%condition (state.1: STATE) -> pred[] {
  %end = s32[]{:T(128)} constant(4)
  %state.1 = STATE parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (x.1: f32[4,250]) -> f32[250] {
  %x.1 = f32[4,250]{1,0:T(8,128)} parameter(0)
  %start = STATE tuple(%x.1)
  %while = STATE while(%start), condition=%condition, body=%body
  %done = f32[250]{0:T(256)S(1)} get-tuple-element(%while), index=1
  ROOT %result = f32[250]{0:T(256)} copy(%done)
}
"""
LOOP = LOOP.replace(
    "STATE", "(s32[]{:T(128)}, f32[250]{0:T(256)S(1)}, f32[4,250]{1,0:T(8,128)})"
).replace(
    "WHAT",
    'calls=%fused, metadata={op_name="jit(f)/add"}, '
    'backend_config={"window_config":{"iteration_bounds":["1","2"]}}',
)


def entry(*lines, more=""):
    """A program of these lines, which begin with arguments `x` and `y`."""
    arguments = [
        "%x = f32[10,25]{1,0:T(8,128)} parameter(0)",
        "%y = f32[25,50]{1,0:T(8,128)} parameter(1)",
    ]
    text = "\n".join(f"  {line}" for line in (*arguments, *lines))
    return f"HloModule m\n{more}\nENTRY %main (x: f32[10,25]) -> f32[] {{\n{text}\n}}\n"


def timed(text, bundles=None, chip=CHIP, **more):
    found = schedule.time_program(text, bundles or {}, chip, **more)
    return {operation.name: operation for operation in found}


def test_a_loop_counts_as_often_as_it_runs():
    found = timed(LOOP, {"add-row": (10, 3), "result": (2, 0)})
    assert list(found) == ["add-row", "result"]
    row = found["add-row"]
    assert row.times == 4 and row.where == "jit(f)/add"
    assert row.bundles_ms == pytest.approx(4 * (10 * 2 + 3))  # two iterations
    assert row.hbm_ms == pytest.approx(4 * 1.0)  # a row of 250, and not all of `x`
    assert row.ms == row.bundles_ms
    assert found["result"].hbm_ms == pytest.approx(1.0)  # it reads VMEM and writes HBM


def test_cores_share_the_bundles_of_an_operation():
    chip = dataclasses.replace(CHIP, cores=2)
    row = timed(LOOP, {"add-row": (10, 3)}, chip)["add-row"]
    assert row.bundles_ms == pytest.approx(4 * (10 * 2 + 3) / 2)
    assert row.hbm_ms == pytest.approx(4 * 1.0)


def test_a_loop_without_a_trip_count_is_refused():
    text = LOOP.replace(
        "%end = s32[]{:T(128)} constant(4)", "%end = s32[] negate(%i.1)"
    )
    with pytest.raises(ValueError, match="trip count of while"):
        timed(text)


def test_a_product_counts_its_flops():
    text = entry(
        "ROOT %z = f32[10,50]{1,0:T(8,128)} convolution(%x, %y), dim_labels=bf_io->bf"
    )
    z = timed(text)["z"]
    assert z.flops_ms == pytest.approx(1e3 * 2 * 10 * 25 * 50 / CHIP.flops)
    assert z.hbm_ms == pytest.approx(4 * (250 + 1250 + 500) / 1e3)
    assert z.bundles_ms is None and z.ms == z.hbm_ms


def test_a_product_in_a_fusion_within_a_fusion_counts_its_flops():
    inner = """
%inner (a: f32[10,25], b: f32[25,50]) -> f32[10,50] {
  %a = f32[10,25]{1,0} parameter(0)
  %b = f32[25,50]{1,0} parameter(1)
  ROOT %dot = f32[10,50]{1,0} dot(%a, %b), lhs_contracting_dims={1}
}

%outer (c: f32[10,25], d: f32[25,50]) -> f32[10,50] {
  %c = f32[10,25]{1,0} parameter(0)
  %d = f32[25,50]{1,0} parameter(1)
  ROOT %fusion.1 = f32[10,50]{1,0} fusion(%c, %d), kind=kOutput, calls=%inner
}
"""
    text = entry(
        "ROOT %z = f32[10,50]{1,0} fusion(%x, %y), kind=kOutput, calls=%outer",
        more=inner,
    )
    assert timed(text)["z"].flops_ms == pytest.approx(0.025)


def test_a_reduction_reads_its_argument():
    """The computation that it applies takes two scalars, which are not its reads."""
    add = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %c = f32[]{:T(128)} add(%a, %b)
}
"""
    text = entry(
        "%zero = f32[]{:T(128)S(6)} constant(0)",
        "ROOT %sum = f32[10]{0:T(128)} reduce(%x, %zero), to_apply=%add",
        more=add,
    )
    assert timed(text)["sum"].hbm_ms == pytest.approx(4 * (250 + 10) / 1e3)


def test_an_update_in_place_writes_the_update():
    fused = """
%fused (p.0: f32[10,25], p.1: f32[1,25], p.2: s32[]) -> f32[10,25] {
  %p.0 = f32[10,25]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[1,25]{1,0:T(8,128)} parameter(1)
  %p.2 = s32[]{:T(128)S(6)} parameter(2)
  ROOT %new = f32[10,25]{1,0:T(8,128)} dynamic-update-slice(%p.0, %p.1, %p.2, %p.2)
}
"""
    text = entry(
        "%i = s32[]{:T(128)S(6)} parameter(2)",
        "%row = f32[1,25]{1,0:T(8,128)} slice(%y), slice={[0:1], [0:25]}",
        "%fusion = f32[10,25]{1,0:T(8,128)} fusion(%x, %row, %i), kind=kLoop, "
        "calls=%fused",
        "ROOT %bare = f32[10,25]{1,0:T(8,128)} dynamic-update-slice(%fusion, %row, %i, "
        "%i)",
        more=fused,
    )
    found = timed(text)
    assert found["fusion"].hbm_ms == pytest.approx(2 * 4 * 25 / 1e3)
    assert found["bare"].hbm_ms == pytest.approx(2 * 4 * 25 / 1e3)


def test_the_slowest_branch_counts():
    branches = """
%short (a: f32[10,25]) -> f32[10,25] {
  %a = f32[10,25]{1,0:T(8,128)} parameter(0)
  ROOT %part = f32[1,25]{1,0:T(8,128)} dynamic-slice(%a)
}

%long (b: f32[10,25]) -> f32[10,25] {
  %b = f32[10,25]{1,0:T(8,128)} parameter(0)
  ROOT %minus = f32[10,25]{1,0:T(8,128)} negate(%b)
}
"""
    text = entry(
        "%i = s32[]{:T(128)} parameter(2)",
        "ROOT %z = f32[10,25]{1,0:T(8,128)} conditional(%i, %x, %x), "
        "branch_computations={%short, %long}",
        more=branches,
    )
    assert list(timed(text)) == ["minus"]


def test_an_asynchronous_call_counts_once():
    """A scatter on a v5p or a v6e is one, on the chip's SparseCore."""
    called = """
%called (a: f32[10,25]) -> f32[10,25] {
  %a = f32[10,25]{1,0:T(8,128)} parameter(0)
  ROOT %scatter = f32[10,25]{1,0:T(8,128)} negate(%a)
}
"""
    text = entry(
        "%start = ((f32[10,25]{1,0:T(8,128)}), f32[10,25]{1,0:T(8,128)}) "
        'call-start(%x), async_execution_thread="sparsecore", to_apply=%called',
        "ROOT %done = f32[10,25]{1,0:T(8,128)} call-done(%start)",
        more=called,
    )
    found = timed(text)
    assert list(found) == ["scatter"]
    assert found["scatter"].hbm_ms == pytest.approx(2 * 4 * 250 / 1e3)


def test_equal_operations_have_one_schedule():
    text = entry(
        "%a = f32[10,25]{1,0:T(8,128)} negate(%x)",
        "%b = f32[10,25]{1,0:T(8,128)} negate(%a)",
        "%c = f32[10,25]{1,0:T(8,128)} exponential(%b)",
        "ROOT %d = f32[25,50]{1,0:T(8,128)} negate(%y)",
    )
    found = timed(text, {"a": (40, 2)})
    assert [found[x].bundles_ms for x in "abcd"] == [42, 42, None, None]


def test_the_grid_of_a_pallas_kernel_is_asked_for():
    call = '%z = f32[10,25]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"'
    text = entry(
        call, '%w = f32[9]{0} custom-call(), custom_call_target="AllocateBuffer"'
    )
    found = timed(text, {"z": (10, 1)})
    assert list(found) == ["z"] and found["z"].bundles_ms is None
    assert timed(text, {"z": (10, 1)}, grids={"z": 7})["z"].bundles_ms == 71


def test_a_summary_adds_up():
    bundles = {"add-row": (10, 3)}
    found = schedule.summary(LOOP, bundles, CHIP, most=1)
    assert found["schedule_ms"] == pytest.approx(92 + 1)
    assert found["hbm_ms"] == pytest.approx(4 + 1) and found["flops_ms"] == 0
    assert [x["name"] for x in found["longest"]] == ["add-row"]
    assert found["unscheduled"] == ["result"]
    assert found["unscheduled_ms"] == pytest.approx(1)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Program(LOOP.replace("ENTRY ", ""))


def test_reads_follow_bitcasts_and_count_a_fusion_once():
    text = entry(
        "%flat = f32[250]{0:T(256)} bitcast(%x)",
        "%a = f32[250]{0:T(256)} negate(%flat)",
        "%b = f32[10,25]{1,0:T(8,128)} add(%x, %x)",
        "ROOT %c = (f32[250]{0:T(256)}, f32[10,25]{1,0:T(8,128)}) tuple(%a, %b)",
    )
    assert hlo.reads(text) == [2, 0]


@pytest.mark.parametrize(
    "text, bytes_, in_hbm",
    [
        ("bf16[4,8]{1,0:T(8,128)(2,1)}", 64, 64),
        ("(s4[10]{0}, pred[3]{0}, u8[]{:S(6)})", 5 + 3 + 1, 5 + 3),
        ("f8e4m3fn[16]{0:S(1)}", 16, 0),
        ("token[]", 0, 0),
    ],
)
def test_sizes_of_arrays(text, bytes_, in_hbm):
    assert hlo.size(text) == bytes_
    assert hlo.size_in_hbm(text) == in_hbm


BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.hbm [shape: bf16[8,128]] }
   0x1   :  { %4 = vst [vmem:[#allocation2] sm:$0xff] %v0
base_bounds: (256, 8) }
   0xc LB: > { %s13 = sadd.s32 4294967295, %s12 }
   0xd   : >> { %p0 = scmp.ge.s32.totalorder %s14, 16 }
   0xe LE: > { %p1 = scmp.lt.s32.totalorder %s12, 32 }
   0xf   :  {}
  0x10   :  {}
"""


def test_bundles_are_read_from_the_newest_file(tmp_path):
    (tmp_path / "logs").mkdir()
    for name, text in (
        ("17-add-row.1-9-final_bundles.txt", BUNDLES),
        ("17-add-row.1-8-schedule-analysis_final_bundles.txt", BUNDLES + BUNDLES),
        ("17-add-row.1-7-post-dedup.txt", BUNDLES),
    ):
        (tmp_path / name).write_text(text)
    assert schedule.read_bundles(tmp_path) == {"add-row.1": (3, 4)}


# jaxkl splits these tokens into tiles.
SHAPE = dict(tokens=4096, hidden=512, vocab=32768)
PRODUCTS_MS = 1e3 * 4 * 2 * 4096 * 512 * 32768 / schedule.CHIPS["v5e"].flops
ARRAY_MS = 1e3 * 2 * 4096 * 32768 / schedule.CHIPS["v5e"].hbm_bytes


@pytest.fixture(scope="module")
def compiled():
    from benchmarks.compiled import compile_for_tpu
    from benchmarks.programs import Job, PRODUCTS

    assert importlib.util.find_spec("libtpu"), "`make test` installs libtpu"
    jobs = {
        "products": Job(PRODUCTS, **SHAPE),
        "plain JAX": Job("plain JAX", **SHAPE),
        "jaxkl": Job("jaxkl", **SHAPE),
        "kl_div": Job("jaxkl", 4096, 32768, loss="kl_div"),
    }
    return dict(zip(jobs, compile_for_tpu("v5e", list(jobs.values())), strict=True))


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.parametrize("name", ["products", "plain JAX", "jaxkl"])
def test_heads_have_the_flops_of_four_products(compiled, name):
    """jaxkl makes them in a loop over tiles, with several operations a tile."""
    found = compiled[name]
    assert found["flops_ms"] == pytest.approx(PRODUCTS_MS, rel=1e-6)
    assert 1 - 1e-6 < found["schedule_ms"] / PRODUCTS_MS < 4
    looped = [x["times"] for x in found["longest"] if x["times"] > 1]
    assert bool(looped) == (name == "jaxkl")


@pytest.mark.slow
@pytest.mark.newest
def test_products_are_bound_by_flops(compiled):
    found = compiled["products"]
    assert found["schedule_ms"] < 1.1 * PRODUCTS_MS
    assert all(x["bundles_ms"] > 0 for x in found["longest"] if x["flops_ms"])


@pytest.mark.slow
@pytest.mark.newest
def test_a_loss_of_probabilities_reads_two_arrays_and_writes_one(compiled):
    found = compiled["kl_div"]
    assert found["reads"] == [1, 1]
    assert found["hbm_ms"] == pytest.approx(3 * ARRAY_MS, rel=1e-2)
    assert 3 * ARRAY_MS < found["schedule_ms"] < 4 * ARRAY_MS
    longest = found["longest"][0]
    assert 0 < longest["bundles_ms"] <= longest["ms"]
