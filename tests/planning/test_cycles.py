"""Tests of the meter of TPU programs: cycles, kernels' bundles, parts and what runs beside them."""

from pathlib import Path

import pytest

from clip_jax.planning.bundles import read_kernel_cycles, scheduled_cycles
from clip_jax.planning.counts import find_collectives
from clip_jax.planning.cycles import time_step, uncounted_names
from clip_jax.planning.hardware import DEVICES
from clip_jax.planning.hlo import Instruction, Shape, parse_program, step_visits
from clip_jax.planning.liveness import live_at_peak
from clip_jax.planning.parts import Part, part_of
from clip_jax.planning.refusal import parse_refusal

# Lines as libtpu 0.0.42 writes them, shortened: a loop of four trips with a kernel and a product,
# an all-gather that runs beside a fusion, a sum that nothing runs beside, and the update.
PROGRAM = Path(__file__).with_name("step.hlo").read_text()
# The sum of two matrices' gradients, cut for a shared update.
CUT_SUM = Path(__file__).with_name("cut_sum.hlo").read_text()
# As libtpu 0.0.42 writes it, shortened: a reduce-scatter that a SparseCore runs beside two products
# of the TensorCore, and an all-to-all that runs beside the first.
OTHER_CORE = Path(__file__).with_name("other_core.hlo").read_text()
CLOCK = 1.5e9


def cycles_of(kernels):
    program = parse_program(PROGRAM)
    timing = time_step(program, "tpu-v5e", DEVICES["tpu-v5e"], kernels)
    return {part: round(seconds * CLOCK) for part, seconds in timing.by_part().items()}, timing


def test_cycles_by_part_with_loops_run_out():
    # The second kernel has no schedule of its own: it is the first one's twin.
    parts, timing = cycles_of({"attention_forward.3": 500})
    gather = round(3 * 32 * 4 / 0.819e12 * CLOCK) or 0
    assert parts == {
        Part("image", "backward", "MLP"): 4 * 3000,
        Part("text", "forward", "attention"): 2 * 4 * 500,
        Part("image", "forward", "norms"): 1500,
        Part("", "", "update"): 900,
        Part("text", "forward", "copies"): 600,
        Part("", "", "loss"): pytest.approx(gather, abs=1),
    }
    assert 0.99 < timing.counted_share < 1
    assert timing.slowest(1)[0].instruction.name == "fusion.2"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("encode_image/visual/dot_general", "projections"),
        ("encode_text/text/text._project/dot_general", "projections"),
        ("encode_image/visual/transformer/resblocks_0/attn/qkv_proj/dot_general", "projections"),
        ("encode_image/visual/visual._embed/visual._project_patches/dot_general", "embedding"),
    ],
)
def test_products_into_the_shared_space_are_projections(path, name):
    attributes = f'metadata={{op_name="jit(step)/jvp(towers)/CLIP/CLIP.{path}"}}'
    line = Instruction("dot.1", "dot", (), (), attributes)
    tower = path.split("/")[0].removeprefix("encode_")
    assert part_of(parse_program(PROGRAM), {"dot.1": line}, line) == Part(tower, "forward", name)


def test_a_kernel_takes_as_long_as_its_bytes_at_least():
    parts, _ = cycles_of({"attention_forward.3": 0, "attention_forward.4": 0})
    # Only the first reads the device's memory; fast memory costs nothing.
    moved = 64 / 0.819e12 * CLOCK
    assert parts[Part("text", "forward", "attention")] == round(4 * moved)


def test_what_the_compiler_does_not_count_is_named():
    program = parse_program(PROGRAM)
    assert uncounted_names(program) == {"attention_forward.3", "attention_forward.4", "gather.1"}


def test_a_collective_spread_over_fusions_counts_once_and_runs_beside_them():
    gather, reduce = find_collectives(parse_program(PROGRAM), 4)
    assert (gather.kind, gather.bytes, gather.beside) == ("all-gather", 128, ("fusion.3",))
    assert (reduce.kind, reduce.bytes, reduce.beside) == ("all-reduce", 128, ())


def test_a_sum_that_is_cut_where_it_is_made_is_a_reduce_scatter():
    (cut,) = find_collectives(parse_program(CUT_SUM), 4)
    assert (cut.kind, cut.bytes, cut.largest) == ("reduce-scatter", 128, 64)
    assert cut.wire_bytes == 0.75 * 128


def test_exchanges_of_another_core_run_beside_this_one():
    program = parse_program(OTHER_CORE)
    cut, swap = find_collectives(program, 4)
    # 4 devices' parts of [2, 4] in bfloat16.
    assert (cut.kind, cut.bytes, cut.beside) == ("reduce-scatter", 64, ("fusion.1", "fusion.2"))
    assert (swap.kind, swap.bytes, swap.beside) == ("all-to-all", 64, ("fusion.1",))
    timing = time_step(program, "tpu-v5p", DEVICES["tpu-v5p"], {})
    assert timing.seconds == pytest.approx(600 / 1.75e9)


def test_the_memory_space_of_an_array():
    program = parse_program(PROGRAM)
    kernel = program.computations["body"]["attention_forward.3"]
    assert kernel.shapes == (Shape("bf16", (8, 4), 1, "1,0:T(8,128)(2,1)"),)
    assert kernel.shapes[0].bytes == 64 and kernel.shapes[0].padded_bytes == 8 * 128 * 2
    assert program.computations["main"]["a"].shapes == (Shape("f32", (8, 4), 0, "1,0"),)
    assert Shape("bf16", (4, 50, 12, 64), 0, "3,0,2,1:T(8,128)(2,1)").padded_bytes == (
        2 * 8 * 50 * 12 * 128
    )


def test_loops_are_run_out_and_fusions_stand_whole():
    times = {v.instruction.name: v.times for v in step_visits(parse_program(PROGRAM))}
    assert times["fusion.2"] == 4 and times["fusion.3"] == 1 and "convolution.1" not in times


# Six bundles in a pipelined loop over a grid of 16, three outside; one empty bundle at each depth.
SCHEDULE = """\
LB: loop body

     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd.s32 1, %s3 /* iteration index, stage = 1 */  ;;  %s4 = sphi 0, %s5 }
   0x2   : > { %p1 = scmp.lt.s32.totalorder %s3, 17 }
   0x3   :  {}
   0x4   : > { %v1 = vld [vmem:[%s1] sm:$0xff] }
   0x5 PF: > { %s6 = sadd.s32 1, %s3 }
   0x6   : > { %p2 = scmp.ge.s32.totalorder %s6, 18 /* loop exit test */ } /* End region 3 */
   0x7   :  { %13 = sbr.rel (!%p2) target = $region76 }
   0x8   :  {}
"""


def test_bundles_of_a_pipelined_grid(tmp_path):
    assert scheduled_cycles(SCHEDULE) == 3 + 6 * 16
    (tmp_path / "17-attention_forward.3-72-final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "17-fusion.1-72-final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "17-fusion.1-71-schedule-analysis_final_bundles.txt").write_text("")
    names = frozenset({"attention_forward.3"})
    assert read_kernel_cycles(str(tmp_path), names) == {"attention_forward.3": 99}


def test_nested_loops_multiply():
    nested = """\
   0x1 LB: > { %v0 }
   0x2 LB: >> { %v1 }
   0x3   : >> { %p2 = scmp.ge.s32.totalorder %s6, 5 /* loop exit test */ }
   0x4   : > { %p2 = scmp.ge.s32.totalorder %s6, 7 /* loop exit test */ }
   0x5 LB: > { %v1 }
   0x6   : > { %p2 = scmp.ge.s32.totalorder %s6, 3 /* loop exit test */ }
"""
    assert scheduled_cycles(nested) == 7 * (2 + 2 * 5) + 2 * 3


def test_a_loop_that_ends_on_the_data_is_not_counted():
    assert scheduled_cycles("   0x1 LB: > { %v0 }\n   0x2   : > { %v1 }\n") is None


REFUSAL = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used \
17.24G of 15.75G hbm. Exceeded hbm capacity by 1.49G.

Total hbm usage >= 17.49G:
    reserved        258.00M
    program          16.98G
    arguments       258.00M

Program hbm requirement 16.98G:
    HLO temp          16.50G (97.3% utilization: Unpadded (14.78G) Padded (15.18G), 0.0% \
fragmentation (0B))

  Largest program allocations in hbm:

  1. Size: 512.00M
     Shape: f32[512,512,512]{2,1,0:T(8,128)}
     Unpadded size: 512.00M
     XLA label: fusion.1 = fusion(p)
     Allocation type: HLO temp
     ==========================

  2. Size: 1.50G
     Operator: op_type="dot_general" op_name="jit(step)/jvp(towers)/CLIP/text/mlp/c_fc/dot_general"
     Shape: bf16[256,77,2048]{2,1,0:T(8,128)}
     Unpadded size: 1.50G
     Allocation type: HLO temp
     ==========================
"""


def test_a_refusal_is_read():
    refusal = parse_refusal(REFUSAL)
    assert refusal.used == round(17.24 * 2**30) and refusal.available == round(15.75 * 2**30)
    assert refusal.temporaries == round(16.5 * 2**30)
    assert [(b.bytes, b.shape) for b in refusal.buffers] == [
        (round(1.5 * 2**30), "bf16[256,77,2048]"),
        (2**29, "f32[512,512,512]"),
    ]
    assert refusal.buffers[0].op_name.endswith("mlp/c_fc/dot_general")
    assert parse_refusal("INTERNAL: something else") is None
    short = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (26.95G) exceeds available HBM (15.75G)."
    )
    refusal = parse_refusal(short)
    assert refusal.used == refusal.temporaries == round(26.95 * 2**30)
    assert refusal.available == round(15.75 * 2**30) and not refusal.buffers


ALIVE = """\
HloModule jit_step, is_scheduled=true

%fill (p0: f32[2,64], p1: f32[1,64], p2: s32[]) -> f32[2,64] {
  %p0 = f32[2,64]{1,0} parameter(0)
  %p1 = f32[1,64]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %dynamic-update-slice.1 = f32[2,64]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%condition (c: (s32[], f32[2,64])) -> pred[] {
  %c = (s32[], f32[2,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(2)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (b: (s32[], f32[2,64])) -> (s32[], f32[2,64]) {
  %b = (s32[], f32[2,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %stack = f32[2,64]{1,0} get-tuple-element(%b), index=1
  %row = f32[1,64]{1,0} slice(%stack)
  %fusion.1 = f32[2,64]{1,0} fusion(%stack, %row, %j), kind=kLoop, calls=%fill
  ROOT %t = (s32[], f32[2,64]{1,0}) tuple(%j, %fusion.1)
}

ENTRY %main (a: f32[2,64]) -> f32[2,64] {
  %a = f32[2,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %stacked = f32[2,64]{1,0} broadcast(%zero)
  %copy-start.1 = (f32[2,64]{1,0:S(1)}, f32[2,64]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done.1 = f32[2,64]{1,0:S(1)} copy-done(%copy-start.1)
  %init = (s32[], f32[2,64]{1,0}) tuple(%zero, %stacked)
  %while.1 = (s32[], f32[2,64]{1,0}) while(%init), condition=%condition, body=%body
  %last = f32[2,64]{1,0} get-tuple-element(%while.1), index=1
  %early = f32[2,64]{1,0} negate(%copy-done.1)
  %sum = f32[2,64]{1,0} add(%early, %last)
  ROOT %out = f32[2,64]{1,0} multiply(%sum, %sum)
}
"""


def test_what_is_alive_at_the_peak_of_a_schedule():
    """The stack of a loop is filled in place; arguments, results and fast memory are apart."""
    peak = live_at_peak(parse_program(ALIVE))
    # At the sum: the loop's stack, the negated copy and the sum itself.
    assert peak.bytes == 3 * 512
    assert {b.name for b in peak.buffers} == {"stacked", "early", "sum"}
    assert all(b.bytes == 512 for b in peak.buffers)


GATHERED = """
HloModule gathered, is_scheduled=true

ENTRY %main (x: f32[32]) -> f32[128] {
  %x = f32[32]{0} parameter(0)
  %start = ((f32[32]{0}), f32[128]{0}, u32[]{:S(2)}, u32[]{:S(2)}) all-gather-start(%x)
  %done = f32[128]{0} all-gather-done(%start)
  %early = f32[128]{0} negate(%done)
  %late = f32[128]{0} add(%early, %done)
  ROOT %out = f32[128]{0} negate(%late)
}
"""


def test_what_was_gathered_is_alive_until_it_is_read():
    """A TPU's marks stand behind what a start brings, and are not it."""
    peak = live_at_peak(parse_program(GATHERED))
    # At the sum: what was gathered, the negated copy and the sum.
    assert {b.name: b.bytes for b in peak.buffers if b.bytes > 8} == {
        "start": 512,
        "early": 512,
        "late": 512,
    }
