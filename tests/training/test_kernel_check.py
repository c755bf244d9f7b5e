"""Before kernels are used on a chip, each form that a program takes is compared; wrong ones go."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from pairs import tiny_config, write_data
from tiny import TEXT, VIT

from clip_jax.data.images import OPENAI
from clip_jax.errors import UserError
from clip_jax.models.block_form import BlockForm
from clip_jax.models.clip import CLIP, CLIPConfig, variable_shapes
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.kernels import check
from clip_jax.models.kernels.forms import AttentionForm, NormForm, noted_forms
from clip_jax.models.packing import Packing
from clip_jax.models.target import Target
from clip_jax.models.zoo import MODELS
from clip_jax.training import trainer
from clip_jax.training.compile_ahead import trace_towers
from clip_jax.training.kernel_check import with_checked_kernels
from clip_jax.training.setup import build_run
from clip_jax.training.teachers import trace_encoder
from clip_jax.training.trainer import run_with_checked_kernels

WIDE = CLIPConfig(
    16,
    dataclasses.replace(VIT.vision, width=64, heads=4),
    dataclasses.replace(TEXT, width=64, heads=2),
)
"""Heads of 16 and 32 features, which the TPU's kernel takes; images are 17 rows."""
EVA = dataclasses.replace(
    WIDE, vision=dataclasses.replace(WIDE.vision, form=BlockForm("before", "swiglu"))
)
FASTVIT = CLIPConfig(16, FastViTConfig(64, (1, 1, 1, 1), (8, 16, 32, 64)), WIDE.text)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", WIDE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pairs"))


def tpu_run(data, sizes, *, scan=False, **changes):
    """Return a run of 64 pairs on eight TPUs: eight of each."""
    values = {"train__batch_size": 64, "model__dtype": "bfloat16"} | changes
    run = build_run(tiny_config(data, **values), 3)
    target = dataclasses.replace(run.model.target, platform="tpu", generation="v5e")
    model = run.model.clone(config=sizes, target=target, scan=scan)
    return dataclasses.replace(run, model=model)


def traced_forms(run):
    with noted_forms() as forms:
        trace_towers(run, run.model)
    return forms


def attention(heads, head_size, is_causal, *packing, **options):
    return AttentionForm(heads, head_size, is_causal, Packing(*packing, **options))


def norms(form, width):
    """The form of the norms beside such an attention."""
    packing = form.packing
    return NormForm(packing.batch // packing.sequences, packing.segment, width, 1e-5)


CAPTIONS = {
    attention(2, 32, True, 8, 16, 16, 8),
    attention(2, 32, True, 8, 24, 24, 4),  # of two segments
}
IMAGES = attention(4, 16, False, 8, 17, 17, 8)


@pytest.mark.parametrize("scan", [False, True])
def test_a_run_s_towers_are_traced(data, scan):
    run = tpu_run(data, WIDE, scan=scan)
    forms = {IMAGES, *CAPTIONS}
    assert traced_forms(run) == forms | {norms(form, 64) for form in forms}
    assert traced_forms(run) == traced_forms(run)  # nothing is taken from a cache


def test_packed_captions_and_left_out_patches_are_traced(data):
    changes = {"data__caption_packing": "8:0.5", "model__patch_dropout": 0.5}
    run = tpu_run(data, WIDE, **changes)
    packing = run.caption_packing
    forms = traced_forms(run)
    ragged = [form for form in forms if isinstance(form, AttentionForm) and form.packing.is_ragged]
    (form,) = ragged
    assert (form.heads, form.is_causal, form.packing.length) == (2, True, packing.segment_rows)
    assert form.packing.batch == math.gcd(packing.segments, 256 // packing.segment_rows)
    images = {f.packing.length for f in forms if isinstance(f, AttentionForm) and not f.is_causal}
    assert images == {9}
    assert attention(2, 32, True, 8, 24, 24, 4) in forms  # where captions do not fit


@pytest.mark.parametrize("remat", ["none", "dots", "blocks"])
def test_blocks_without_a_backward_pass_of_their_own_are_traced(data, remat):
    forms = {
        attention(4, 16, False, 4, 17, 17),
        attention(2, 32, True, 4, 24, 24),
        attention(2, 32, True, 4, 16, 16),
    }
    assert traced_forms(tpu_run(data, WIDE, model__remat=remat)) == forms


def test_dropped_paths_are_traced(data):
    forms = traced_forms(tpu_run(data, WIDE, model__drop_path=0.1))
    assert attention(4, 16, False, 4, 17, 17) in forms and forms > CAPTIONS


@pytest.mark.parametrize(
    ("sizes", "image"),
    [
        (EVA, attention(4, 16, False, 4, 17, 17)),
        (FASTVIT, attention(2, 32, False, 4, 4, 4)),
    ],
)
def test_towers_of_other_blocks_are_traced(data, sizes, image):
    images = {
        form
        for form in traced_forms(tpu_run(data, sizes))
        if isinstance(form, AttentionForm) and not form.is_causal
    }
    assert images == {image}


def test_micro_batches_and_evaluations_are_traced(data):
    changes = {"eval__data": "there", "eval__every": 1, "eval__tasks": ("zeroshot_retrieval",)}
    run = tpu_run(data, WIDE, train__microbatch_size=16, eval__batch_size=8, **changes)
    images = {
        form.packing.sequences
        for form in traced_forms(run)
        if isinstance(form, AttentionForm) and not form.is_causal
    }
    assert images == {2, 1}


def test_a_teacher_s_towers_are_traced(data):
    run = tpu_run(data, WIDE)
    model = CLIP(WIDE, dtype=jnp.bfloat16, target=run.model.target.alone)
    with noted_forms() as forms:
        trace_encoder(model, run.mesh, OPENAI, variable_shapes(model))
    assert forms == {attention(4, 16, False, 4, 17, 17), attention(2, 32, True, 4, 24, 24)}


class MosaicError(Exception):
    """What JAX makes of an error that tells a place in a kernel: of no type of its own errors."""


def fake_errors(monkeypatch, error):
    """Let every comparison give this; return the list of the forms that are compared."""
    compared = []

    def kernel_error(form, target):
        compared.append(form)
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(check, "kernel_error", kernel_error)
    return compared


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (3.0, "by 3.0 times bfloat16's rounding"),
        (math.nan, "not finite"),
        (jax.errors.JaxRuntimeError("Mosaic failed"), "JaxRuntimeError: Mosaic failed"),
        (MosaicError("not\nthere"), "MosaicError: not there"),
        (NotImplementedError("a layout"), "NotImplementedError: a layout"),
    ],
)
def test_wrong_kernels_are_replaced_in_a_line(data, monkeypatch, capsys, error, words):
    compared = fake_errors(monkeypatch, error)
    run = tpu_run(data, WIDE)
    model = run_with_checked_kernels(run).model
    assert compared and model == run.model.clone(attention="xla")
    line = capsys.readouterr().out
    assert words in line and line.endswith("please report this line\n") and line.count("\n") == 1
    assert not traced_forms(dataclasses.replace(run, model=model))


def test_right_kernels_stay_and_each_form_is_compared_once(data, monkeypatch, capsys):
    compared = fake_errors(monkeypatch, 1.0)
    run = tpu_run(data, WIDE)
    assert run_with_checked_kernels(run).model is run.model
    assert not capsys.readouterr().out
    assert set(compared) == traced_forms(run) and len(compared) == len(set(compared)) == 6


def test_the_step_is_made_of_the_checked_model(data, tmp_path, monkeypatch):
    def stop(run):
        raise UserError(f"made with {run.model.attention}")

    def checked(model, trace):
        trace(model)
        return model.clone(attention="xla")

    monkeypatch.setattr(trainer, "with_checked_kernels", checked)
    monkeypatch.setattr(trainer, "make_step", stop)
    with pytest.raises(UserError, match="made with xla"):
        trainer.train(tiny_config(data), str(tmp_path))


@pytest.mark.parametrize(("platform", "attention"), [("cuda", "auto"), ("tpu", "xla")])
def test_nothing_is_traced_where_the_kernels_are_not_used(platform, attention):
    model = CLIP(VIT, dtype=jnp.bfloat16, target=Target(platform, "v5e"), attention=attention)
    assert with_checked_kernels(model, SimpleNamespace()) is model
