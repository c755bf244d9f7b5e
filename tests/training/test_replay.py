"""Any step of a run can be made again, to the bit, and says what was wrong in it."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from pairs import run_losses, tiny_config, write_data
from tiny import VIT

from clip_jax import main
from clip_jax.errors import EXIT_ERROR, UserError
from clip_jax.losses.dense import pair_losses, sigmoid_loss, softmax_loss
from clip_jax.models import zoo
from clip_jax.tools.replay import replay_text, shard_losses, write_replay
from clip_jax.training.replay import module_of, replay

TINY = dataclasses.replace(
    VIT,
    vision=dataclasses.replace(VIT.vision, layers=1),
    text=dataclasses.replace(VIT.text, layers=1, context_length=16),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module", autouse=True)
def tiny_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, "tiny", TINY)
        yield


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    """Train 9 steps; the run was shorter first, and its learning rate another."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(data, train__steps=6, checkpoint__every=4)
    assert main.run(config, str(folder)) == 0
    later = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=9),
        optim=dataclasses.replace(config.optim, learning_rate=1e-3),
    )
    assert main.run(later, str(folder), allow_change=["config.optim.learning_rate"]) == 0
    return folder


def test_steps_before_and_after_a_change_are_equal_to_the_bit(workdir, tmp_path):
    logged = dict(run_losses(workdir))
    before = sorted(path.name for path in workdir.iterdir())
    early = replay(workdir, 5, around=1)
    late = replay(workdir, 8)
    assert (early.start, late.start) == (0, 6)
    assert early.is_equal and late.is_equal
    assert [(p["step"], p["loss"]) for p in early.curve] == [(s, logged[s]) for s in (4, 5, 6)]
    assert sorted(path.name for path in workdir.iterdir()) == before

    assert len({s.key for s in late.samples}) == 16 and not late.not_finite
    losses = [(s.image_loss + s.text_loss) / 2 for s in late.samples]
    assert np.mean(losses) == pytest.approx(late.metrics["loss"], rel=1e-5)
    norm = np.sqrt(sum(value**2 for value in late.gradient_norms.values()))
    assert norm == pytest.approx(late.metrics["grad_norm"], rel=1e-5)
    assert {"visual/transformer/resblocks_0", "logit_scale"} <= set(late.gradient_norms)
    assert sum(count for _, count in shard_losses(late).values()) == 16
    text = replay_text(early)
    assert "made again from step 0" in text and "equal to the bit" in text and "\n>5 " in text
    files = write_replay(late, tmp_path / "out")
    assert [path.name for path in files] == ["step.json", "samples.png"]
    assert json.loads(files[0].read_text())["samples"][0]["key"] == late.samples[0].key


def test_the_exit_explains_itself_and_a_refused_start_leaves_it(data, workdir):
    text = (workdir / "exit.json").read_text()
    told = json.loads(text)
    assert (told["code"], told["reason"], told["last_step"]) == (0, "all 9 steps are done", 9)
    assert [(line["step"], line["loss"]) for line in told["steps"]] == run_losses(workdir)[-3:]
    assert [start["step"] for start in told["history"]] == [0, 6]
    assert told["config"]["optim"]["learning_rate"] == 1e-3 and told["devices"] == "8 cpu"
    assert {"python", "jax", "clip_jax"} <= set(told["versions"]) and "commit" in told
    with pytest.raises(UserError, match=r"config\.seed = 0 and now it is 1"):
        main.run(tiny_config(data, train__steps=9, seed=1), str(workdir))
    assert (workdir / "exit.json").read_text() == text


def test_steps_that_cannot_be_made_are_named(workdir):
    with pytest.raises(UserError, match="--step 10: the run has 9 steps"):
        replay(workdir, 10)
    with pytest.raises(UserError, match="steps count from 1"):
        replay(workdir, 0)
    with pytest.raises(UserError, match="is not a work folder"):
        replay(workdir / "checkpoints", 1)


def test_a_run_that_is_not_finite_names_the_command_that_finds_where(data, tmp_path, capsys):
    config = tiny_config(data, train__steps=4)
    # What the config does not take: parameters of 1e30, finite themselves.
    optim = dataclasses.replace(config.optim, learning_rate=1e30, warmup_steps=0)
    config = dataclasses.replace(config, optim=optim)
    assert main.run(config, str(tmp_path)) == EXIT_ERROR
    line = capsys.readouterr().err.strip()
    told = json.loads((tmp_path / "not_finite.json").read_text())
    assert line.endswith(f"python -m clip_jax.replay {tmp_path} --step {told['step']}")
    end = json.loads((tmp_path / "exit.json").read_text())
    assert end["code"] == EXIT_ERROR and end["steps"][-1]["loss"] == "NaN"
    assert end["reason"].startswith(f"step {told['step']} is not finite; to look into it: python")
    found = replay(tmp_path, told["step"])
    assert [s.key for s in found.samples] == told["keys"]
    stage, place = next(iter(found.not_finite.items()))
    assert stage == "forward" and "/" in place
    assert f"not finite first: forward, {place}" in replay_text(found)
    with pytest.raises(UserError, match=f"not finite and ends the run; give --step {told['step']}"):
        replay(tmp_path, told["step"] + 1)


@pytest.mark.parametrize(("name", "loss"), [("softmax", softmax_loss), ("sigmoid", sigmoid_loss)])
def test_the_losses_of_pairs_have_the_loss_as_their_mean(name, loss):
    rng = np.random.default_rng(0)
    z = [jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2)]
    masks = {
        "valid_B": jnp.array([True, True, False, True, True, True]),
        "caption_id_B": jnp.array([1, 2, 3, 1, 4, 5], jnp.uint32),
    }
    parts = pair_losses(name, *z, jnp.float32(2.0), jnp.float32(-1.0), **masks)
    valid = np.asarray(masks["valid_B"])
    mean = np.mean((np.asarray(parts.image_B) + np.asarray(parts.text_B))[valid]) / 2
    whole = loss(*z, jnp.float32(2.0), jnp.float32(-1.0), **masks).loss
    assert mean == pytest.approx(float(whole), rel=1e-6)


def test_modules_are_blocks_inside_the_towers():
    assert module_of("visual/transformer/resblocks_3/mlp/c_fc/kernel") == (
        "visual/transformer/resblocks_3"
    )
    assert module_of("text/token_embedding/embedding") == "text/token_embedding"
    assert module_of("logit_scale") == "logit_scale"
