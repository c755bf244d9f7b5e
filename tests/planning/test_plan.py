"""Tests of the planner: its counts equal the compiler's figures and the hand counts."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import compile_step, step_of
from tiny import RESNET, VIT

from clip_jax.config import default, resolve
from clip_jax.errors import UserError
from clip_jax.models.flops import train_flops_per_pair
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.zoo import model_config
from clip_jax.parallel.mesh import batch_shards
from clip_jax.planning.compilers import Compiler
from clip_jax.planning.counts import find_collectives, matmul_flops, replica_group
from clip_jax.planning.estimate import USABLE, step_time
from clip_jax.planning.hardware import DEVICES, find_device
from clip_jax.planning.hlo import parse_program, trip_count, visits
from clip_jax.planning.memory import Memory, measure_memory
from clip_jax.planning.plan import RefusedPlan, hidden_seconds, make_plan, run_steps
from clip_jax.planning.program import StepCosts, loss_flops
from clip_jax.planning.record import plan_record
from clip_jax.planning.refusal import Buffer, Refusal
from clip_jax.planning.scopes import in_loss, step_scopes
from clip_jax.planning.text import change_text, format_bytes, plan_text
from clip_jax.protobuf import fields, varints
from clip_jax.tools.plan import parse, plan
from clip_jax.training.state import device_bytes
from clip_jax.training.step import LOSS, TOWERS, UPDATE


def program_of(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    compiled = jax.jit(function).lower(*arrays).compile()
    return parse_program(compiled.as_text()), compiled


@settings(max_examples=5, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9))
def test_a_product_counts_as_the_compiler_counts_it(m, k, n):
    program, compiled = program_of(jnp.matmul, (m, k), (k, n))
    assert matmul_flops(program) == compiled.cost_analysis()["flops"] == 2 * m * k * n


def convolve(x, kernel):
    """Convolve without padding and with a stride of one, where the compiler's count agrees."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)


def test_a_convolution_counts_as_the_compiler_counts_it():
    program, compiled = program_of(convolve, (2, 9, 9, 3), (3, 3, 3, 5))
    assert matmul_flops(program) == compiled.cost_analysis()["flops"] == 2 * 2 * 49 * 27 * 5


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolutions_gradients_cost_as_much_as_itself(stride):
    def loss(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=numbers
        )
        return jnp.sum(y * y)

    program, _ = program_of(jax.grad(loss, argnums=(0, 1)), (4, 8, 8, 16), (3, 3, 16, 32))
    once = 2 * 4 * (8 // stride) ** 2 * 9 * 16 * 32
    assert matmul_flops(program) == 3 * once


@pytest.mark.parametrize("times", [2, 7])
def test_a_loops_body_counts_as_often_as_it_runs(times):
    """The compiler's own count takes it once."""

    def looped(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=times)[0]

    program, compiled = program_of(looped, (8, 8), (8, 8))
    assert matmul_flops(program) == times * 2 * 8**3
    assert compiled.cost_analysis()["flops"] < 2 * 2 * 8**3
    (loop,) = [v.instruction for v in visits(program) if v.instruction.opcode == "while"]
    assert trip_count(program, loop) == times


def test_a_loop_that_ends_on_the_data_is_refused():
    def looped(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9.0, lambda x: x @ w, x)

    program, _ = program_of(looped, (4, 4), (4, 4))
    with pytest.raises(ValueError, match="trip count"):
        matmul_flops(program)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_of_a_collective(text, group):
    assert replica_group(text, 8) == group


def test_what_a_device_sends():
    """A ring of n: (n-1)/n of the array for a gather or a scatter, twice that for a sum."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def exchange(x):
        gathered = jax.lax.all_gather(x, "x", tiled=True)
        summed = jax.lax.psum(gathered * x[0, 0], "x")
        return jax.lax.psum_scatter(summed * gathered, "x", tiled=True)

    mapped = jax.shard_map(exchange, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
    program, _ = program_of(mapped, (64, 4))
    by_kind = {x.kind: x for x in find_collectives(program, 8)}
    size = 64 * 4 * 4
    assert {kind: x.bytes for kind, x in by_kind.items()} == {
        "all-gather": size,
        "all-reduce": size,
        "reduce-scatter": size,
    }
    assert by_kind["all-gather"].wire_bytes == 7 / 8 * size
    assert by_kind["reduce-scatter"].wire_bytes == 7 / 8 * size
    assert by_kind["all-reduce"].wire_bytes == 2 * 7 / 8 * size


def check_memory(step):
    stats = step.compiled.memory_analysis()
    shards = batch_shards(step.shapes.step.sharding.mesh)
    memory = measure_memory(
        step.compiled,
        step.program,
        step.shapes,
        embed_dim=step.config.embed_dim,
        rows=step.batch["valid"].size // shards,
    )
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
    assert memory.total == total == sum(memory.kinds.values())
    assert all(size >= 0 for size in memory.kinds.values())
    s = step.shapes
    assert memory.kinds["parameters"] == device_bytes(s.params)
    assert memory.kinds["optimizer"] == device_bytes(s.opt_state)
    # To the byte: the program's arguments are the state and the batch.
    state = device_bytes(s)
    assert stats.argument_size_in_bytes == state + device_bytes(step.batch)
    assert memory.kinds["batch"] == device_bytes(step.batch)
    # The compiler names what is alive at its peak; gaps and constants are the rest of it.
    named = sum(
        memory.kinds.get(kind, 0)
        for kind in ("activations", "gradients", "copies of parameters", "embeddings", "loss")
    )
    assert 0.7 * stats.temp_size_in_bytes < named <= stats.temp_size_in_bytes
    assert memory.kinds["activations"] > 0.5 * named


def test_memory_is_the_compilers():
    check_memory(step_of("fsdp"))


def first_convolution(c):
    """Count the gradient of the image, which nobody takes; a hand count of 3 x forward has it."""
    if isinstance(c, ResNetConfig):
        return 2 * (c.image_size // 2) ** 2 * 27 * c.width // 2
    return 2 * c.grid_size**2 * 3 * c.patch_size**2 * c.width


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_operations_are_the_hand_count(scan):
    config = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, image_size=64))
    step = compile_step(config, (1, 1, 1), pairs=32, scan=scan)
    check_operations(step, config, 32)
    check_memory(step)


@pytest.mark.slow
def test_a_resnets_operations_and_memory():
    config = dataclasses.replace(RESNET, vision=ResNetConfig(64, (1, 1, 1, 1), 32))
    step = compile_step(config, (1, 1, 1), pairs=16)
    check_operations(step, config, 16)
    check_memory(step)


def check_operations(step, config, pairs, **options):
    hand = pairs * train_flops_per_pair(config, config.text.context_length, **options)
    hand += loss_flops(pairs, 1, config.embed_dim, platform="cpu", tile_size=16)
    if "image" not in options.get("frozen", ()):
        hand -= pairs * first_convolution(config.vision)
    # 2 %: products with a vector, which the compiler turns into sums, are not counted as products.
    assert step.flops == pytest.approx(hand, rel=0.02)


@pytest.mark.parametrize("freeze", ["image", "text"])
def test_a_frozen_tower_has_no_backward_pass(freeze):
    check_operations(compile_step(VIT, (1, 1, 1), freeze=freeze), VIT, 64, frozen=(freeze,))


def test_dropped_patches_are_not_counted():
    config = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, image_size=64))
    step = compile_step(config, (1, 1, 1), pairs=32, patch_dropout=0.75)
    check_operations(step, config, 32, num_patches=config.vision.grid_size**2 // 4)


def test_kept_cosines_are_not_computed_again():
    chosen, computed_again = (
        loss_flops(4096, 1, 512, platform="cpu", tile_size=n) for n in (0, 1024)
    )
    assert 4 * chosen == 3 * computed_again
    assert loss_flops(2**16, 1, 512, platform="cpu", tile_size=0) == loss_flops(
        2**16, 1, 512, platform="cpu", tile_size=1024
    )


def test_in_a_large_model_the_first_convolution_is_nothing():
    config = model_config("ViT-L/14")
    pair = train_flops_per_pair(config, config.text.context_length)
    assert first_convolution(config.vision) < 0.002 * pair


@pytest.mark.parametrize(
    ("op_name", "scopes"),
    [
        ("jit(step)/jvp(towers)/CLIP/CLIP.encode_image/visual/ln_pre/sub", {TOWERS}),
        ("jit(step)/while/body/closed_call/transpose(jvp(towers))/CLIP/add", {TOWERS}),
        ("jit(step)/transpose(jvp(loss))/shard_map/reduce_scatter", {LOSS}),
        ("jit(step)/(transpose(jvp(loss))/psum_invariant:jvp(loss)/psum)", {LOSS}),
        ("jit(step)/(transpose(jvp(towers))/CLIP/mul:transpose(jvp(loss))/div)", {TOWERS, LOSS}),
        ("jit(step)/update/pow", {UPDATE}),
        ("jit(step)/jit(update)/pow", set()),
        ("jit(step)/reduce_sum", set()),
        ("state.params['text']['loss']", set()),
        ("", set()),
    ],
)
def test_scopes_of_an_instruction(op_name, scopes):
    assert step_scopes(op_name) == scopes
    assert in_loss(op_name) == (scopes == {LOSS})


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 4, 1)])
def test_the_compiled_step_has_every_scope(mesh):
    """Without them the planner would sort by dimensions alone."""
    step = step_of("fsdp") if mesh != (1, 1, 1) else compile_step(VIT, mesh)
    lines = [line for lines in step.program.computations.values() for line in lines.values()]
    assert {s for line in lines for s in step_scopes(line.op_name)} == {TOWERS, LOSS, UPDATE}


CPU = Compiler("cpu", "jaxlib", "0.10.2")


def costs_of(**changes):
    kinds = {"parameters": 10e9, "optimizer": 20e9, "batch": 1e9, "activations": 60e9}
    start = StepCosts(
        compiler=CPU,
        mesh={"data": 32, "fsdp": 1, "tensor": 1},
        parameters={"image": 1, "text": 1, "other": 1, "total": 3},
        rows=128,
        memory=Memory(kinds, sum(kinds.values())),
        temp_bytes=60 * 10**9,
        flops=10**14,
        needed_flops=10**14,
        collectives=[],
        timing=None,
    )
    return dataclasses.replace(start, **changes)


def config_of(**values):
    c = default()
    c.train.steps, c.train.batch_size, c.model.dtype = 10, 4096, "bfloat16"
    with c.unlocked():
        c.update_from_flattened_dict(values)
    return resolve(c)


def plan_of(config, costs=None, **options):
    options = {"utilization": 0.5, "pairs": None} | options
    return make_plan(costs or costs_of(), config, "h100", DEVICES["h100"], **options)


def test_seconds_of_a_step():
    time = step_time(costs_of(), DEVICES["h100"], dtype="bfloat16", utilization=0.5)
    assert time.compute == pytest.approx(1e14 / (0.5 * 989.4e12))
    # State read and written, gradients written and read.
    assert time.update == pytest.approx((2 * 30e9 + 2 * 10e9) / 3.35e12)
    assert time.loss == time.others == 0
    assert time.overlapped == time.serial == time.compute + time.update


def test_bandwidths_inside_a_machine_and_between_machines():
    h100 = DEVICES["h100"]
    assert h100.bandwidth(tuple(range(8))) == 450e9
    assert h100.bandwidth(tuple(range(256))) == 8 * 50e9  # eight of each machine share its network
    assert h100.bandwidth(tuple(range(0, 256, 8))) == 50e9  # one of each machine
    assert DEVICES["tpu-v5p"].bandwidth(tuple(range(256))) == 600e9


def test_what_fits_needs_no_advice():
    small = plan_of(config_of(), costs_of(memory=Memory({"activations": 5e10}, 5e10)))
    assert small.fits and small.changes == ()


@settings(max_examples=50, deadline=None)
@given(
    batch=st.sampled_from([2**12, 3 * 2**10, 5 * 2**11]),
    data=st.sampled_from([1, 4, 32]),
    activations=st.floats(2e10, 2e12),
)
def test_the_micro_batch_it_names_fits(batch, data, activations):
    kinds = {"parameters": 10e9, "optimizer": 20e9, "activations": activations}
    mesh = {"data": data, "fsdp": 1, "tensor": 1}
    costs = costs_of(mesh=mesh, rows=batch // data, memory=Memory(kinds, sum(kinds.values())))
    changes = plan_of(config_of(**{"train.batch_size": batch}), costs).changes
    change = next((c for c in changes if c.field == "train.microbatch_size"), None)
    if change:
        assert batch % change.value == 0 and change.value % data == 0
        assert 30e9 + activations * change.value / batch <= USABLE * 80e9
    elif costs.memory.total > USABLE * 80e9:
        # Not even one row a device at a time.
        assert 30e9 + activations * data / batch > USABLE * 80e9


def test_advice_names_what_splits_the_state():
    memory = Memory({"parameters": 30e9, "optimizer": 60e9}, int(9e10))
    large = plan_of(config_of(), costs_of(memory=memory))
    line = change_text(large, large.changes[0])
    assert line.startswith("config.mesh.fsdp=8") and "11.2 GB instead of 90.0 GB" in line


def test_what_does_not_fit_says_so_where_nothing_can_be_changed():
    config = config_of(**{"model.remat": "blocks", "model.scan": True})
    memory = Memory({"parameters": 30e9, "optimizer": 60e9}, int(9e10))
    large = plan_of(config, costs_of(memory=memory, mesh={"data": 1, "fsdp": 32, "tensor": 1}))
    assert large.changes == () and "does not fit: 112 %" in plan_text(large)


@pytest.mark.parametrize("remat", ["auto", "none", "minimal", "dots", "blocks", "full"])
def test_a_loop_is_advice_where_it_takes_less(remat):
    """ViT-L/14 on H100s: minimal 43.0 GB in a loop for 38.7, dots 36.6 for 34.9, blocks 6.4 for
    13.7 (docs/planning.md, docs/performance.md)."""
    changes = plan_of(config_of(**{"model.remat": remat})).changes
    assert ("model.scan" in [c.field for c in changes]) == (remat == "blocks")


def test_a_plan_in_words():
    plan = plan_of(config_of(**{"train.steps": 86_400}))
    text = plan_text(plan)
    assert "does not fit: 114 % of the h100's 80 GB" in text
    assert "remat=blocks" in text and "microbatch_size=2048" in text
    assert (
        f"the run, 86,400 steps: {plan.time.serial:.2f}" in text
    )  # as many days as seconds a step


REFUSED = RefusedPlan(
    config_of(),
    "tpu-v5e",
    DEVICES["tpu-v5e"],
    {"data": 2, "fsdp": 4, "tensor": 1},
    Compiler("tpu", "libtpu", "0.0.42"),
    Refusal(
        int(20e9),
        int(16e9),
        int(18e9),
        tuple(
            Buffer(n * 10**9, f"bf16[{n}]", f"jit(step)/CLIP/mlp{n}/mul") for n in range(9, 1, -1)
        ),
    ),
    10,
)


def test_a_refusal_in_words():
    text = plan_text(REFUSED, top=5)
    assert text.startswith(
        f"{config_of().model.name} on 8 x tpu-v5e does not fit: XLA for TPUs (libtpu 0.0.42) "
        "refused it, 20.0 GB of the 16.0 GB that a program can have; its largest arrays: "
        "9.0 GB bf16[9] (CLIP mlp9 mul); 8.0 GB bf16[8] (CLIP mlp8 mul); "
    )
    assert "bf16[5]" in text and "bf16[4]" not in text and "\n" not in text
    bare = dataclasses.replace(REFUSED, refusal=Refusal(int(20e9), int(16e9), None, ()))
    assert plan_text(bare).endswith("of the 16.0 GB that a program can have")


def documented_keys():
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    table = page.partition("`--json FILE` writes:")[2].strip().partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    return [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]


@pytest.mark.parametrize("made", [plan_of(config_of()), REFUSED], ids=["plan", "refusal"])
def test_the_record_has_the_documented_keys(made):
    record = plan_record(made)
    assert sorted(record) == sorted(documented_keys())
    assert json.loads(json.dumps(record)) == record
    assert record["steps"] == 10 and record["devices"] == math.prod(record["mesh"].values())


def test_what_is_known_of_a_refused_program():
    record = plan_record(REFUSED)
    assert record["mesh"] == REFUSED.mesh and record["fits"] is False
    assert (record["memory_bytes"], record["temp_bytes"]) == (20e9, 18e9)
    assert record["largest_buffers"][0] == {
        "bytes": 9 * 10**9,
        "shape": "bf16[9]",
        "op_name": "jit(step)/CLIP/mlp9/mul",
    }
    assert record["breakdown"] == record["collectives"] == []
    assert record["estimated_by"] is None and record["memory_by_kind"] is None
    assert plan_record(plan_of(config_of()))["largest_buffers"] == []


def test_steps_of_the_run():
    epochs = {"train.steps": 0, "train.epochs": 2.0}
    assert run_steps(config_of(), None) == 10
    assert run_steps(config_of(**epochs), 8192) == 4
    assert run_steps(config_of(**epochs), None) is None


def test_units():
    sizes = [0, 999, 1e3, 2.5e6, 1e9, 1.23e12]
    assert [format_bytes(n) for n in sizes] == [
        *("0 B", "999 B", "1.0 kB", "2.5 MB", "1.0 GB", "1,230.0 GB")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "'abacus' is not known; known are: v100"),
        ({"devices": 0}, "--devices is 0"),
        ({"utilization": 0.0}, "--utilization is 0"),
        ({"utilization": 1.5}, "--utilization is 1.5"),
        ({"pairs": 3}, "--pairs is 3"),
        (
            {"device": "v100"},
            "no rate is published for bfloat16 on V100-SXM2, but for float32: set config.model",
        ),
    ],
)
def test_mistakes_are_one_line(options, message):
    options = {"devices": 8, "device": "h100"} | options
    with pytest.raises(UserError, match=re.escape(message)):
        plan(config_of(), **options)


@pytest.mark.parametrize("name", ["--utilization", "--utilisation"])
def test_flags_of_the_plan_and_of_the_config(name, capsys):
    args, rest = parse(
        ["plan", "--config", "a.py", "--devices", "8", f"{name}=0.25", "--config.b=1"]
    )
    assert (args.devices, args.device, args.utilization) == (8, "h100", 0.25)
    assert rest == ["--config", "a.py", "--config.b=1"]
    with pytest.raises(SystemExit):
        parse(["plan", "--help"])
    assert "utilisation" not in capsys.readouterr().out


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_a_peak(name):
    device = find_device(name.upper())
    dtype = "float32" if name == "v100" else "bfloat16"
    assert device.peak(dtype) > 1e13
    assert device.memory_bandwidth > device.link_bandwidth >= (device.network_bandwidth or 0)


def command(*arguments):
    line = [sys.executable, "-m", "clip_jax.plan", *arguments]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_command_says_what_is_missing_or_does_not_fit():
    experiment = ("--config", "experiments/vit_b32.py")
    missing = command(*experiment)
    assert missing.returncode == 2 and "error: --devices is missing" in missing.stderr
    wrong = command(*experiment, "--devices", "12", "--config.mesh.fsdp=8")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stderr
    assert "config.mesh asks for 1 x 8 x 1" in wrong.stderr and "there are 12" in wrong.stderr


@pytest.mark.slow
def test_the_command_plans_more_devices_than_there_are():
    done = command(
        *("--config", "experiments/emoji_vit.py", "--devices", "32", "--device", "a100"),
        *("--config.data.tokenizer=clip", "--config.mesh.fsdp=4", "--config.eval.data="),
        # "minimal" folds the last block's keys and values into its one query: a fifth of so few.
        "--config.model.remat=none",
    )
    assert done.returncode == 0, done.stderr
    assert "32 x a100: data=8 x fsdp=4 x tensor=1" in done.stdout
    ratio = float(re.search(r"does ([\d.]+) times", done.stdout).group(1))
    assert math.isclose(ratio, 1, abs_tol=0.1)  # a tiny model: its first convolution shows


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_numbers_of_a_protocol_buffer(values):
    def varint(n):
        low = [(n >> shift) & 127 for shift in range(0, max(n.bit_length(), 1), 7)]
        return bytes([b | 128 for b in low[:-1]] + low[-1:])

    packed = b"".join(map(varint, values))
    assert varints(packed) == values
    message = b"".join(varint(5 << 3) + varint(v) for v in values)
    message += varint(7 << 3 | 2) + varint(len(packed)) + packed
    message += varint(9 << 3 | 1) + np.float64(1).tobytes() + varint(10 << 3 | 5) + bytes(4)
    *read, text, double, single = [(number, value) for number, _, value in fields(message)]
    assert read == [(5, v) for v in values] and text == (7, packed)
    assert double == (9, np.float64(1).tobytes()) and single == (10, bytes(4))


def test_computation_hides_the_exchanges_beside_it_once():
    each = {"a": 2.0, "b": 3.0, "c": 1.0}
    # Alone: what it needs, or what runs beside it.
    assert hidden_seconds([4.0], [("a", "b")], each) == [4.0]
    assert hidden_seconds([9.0], [("b", "c", "of another core")], each) == [4.0]
    # Both over `b`: the first to end has it, the other what is left, and `c`.
    assert hidden_seconds([3.0, 4.0], [("b", "c"), ("a", "b")], each) == [2.0, 4.0]
    assert hidden_seconds([3.0, 3.0], [("b",), ("b",)], each) == [3.0, 0.0]
    assert hidden_seconds([1.0], [()], each) == [0.0]
