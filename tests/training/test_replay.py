"""Any step of a run can be made again, to the bit, and says what was wrong in it."""

import dataclasses
import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from pairs import run_losses, tiny_config, write_data
from tiny import VIT

from clip_jax import main
from clip_jax.errors import EXIT_TERMINATED, UserError
from clip_jax.losses.dense import pair_losses, sigmoid_loss, softmax_loss
from clip_jax.models import zoo
from clip_jax.tools.replay import replay_text, shard_losses, write_replay
from clip_jax.training import replay as replay_module
from clip_jax.training import run_logger
from clip_jax.training.replay import module_of, replay

# The programs are test_trainer's, which its worker may have compiled.
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


def config_of(data, **changes):
    return tiny_config(data, train__steps=12, checkpoint__every=5, **changes)


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    """Train 12 steps; after the first 6 or 7 the run is stopped, and its images are mirrored."""
    folder = tmp_path_factory.mktemp("run")
    original = run_logger.RunLogger.log_step

    def stop(self, step, *args):
        if step == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_logger.RunLogger, "log_step", stop)
        assert main.run(config_of(data), str(folder)) == EXIT_TERMINATED
    told = json.loads((folder / "exit.json").read_text())
    assert told["code"] == EXIT_TERMINATED and told["reason"].startswith("SIGTERM: saved step")
    later = config_of(data, data__flip=0.5)
    assert main.run(later, str(folder), allow_change=["config.data.flip"]) == 0
    return folder


def test_steps_before_and_after_a_change_are_equal_to_the_bit(workdir, tmp_path):
    logged = dict(run_losses(workdir))
    before = sorted(path.name for path in workdir.iterdir())
    early = replay(workdir, 4, around=1)
    late = replay(workdir, 11)
    assert (early.start, late.start) == (0, 10)
    assert early.is_equal and late.is_equal
    assert [(p["step"], p["loss"]) for p in early.curve] == [(s, logged[s]) for s in (3, 4, 5)]
    assert sorted(path.name for path in workdir.iterdir()) == before

    assert len({s.key for s in late.samples}) == 16 and not late.not_finite
    losses = [(s.image_loss + s.text_loss) / 2 for s in late.samples]
    assert np.mean(losses) == pytest.approx(late.metrics["loss"], rel=1e-5)
    norm = np.sqrt(sum(value**2 for value in late.gradient_norms.values()))
    assert norm == pytest.approx(late.metrics["grad_norm"], rel=1e-5)
    assert {"visual/transformer/resblocks_0", "logit_scale"} <= set(late.gradient_norms)
    assert sum(count for _, count in shard_losses(late).values()) == 16
    text = replay_text(early)
    assert "made again from step 0" in text and "equal to the bit" in text and "\n>4 " in text
    files = write_replay(late, tmp_path / "out")
    assert [path.name for path in files] == ["step.json", "samples.png"]
    assert json.loads(files[0].read_text())["samples"][0]["key"] == late.samples[0].key


def test_the_exit_explains_itself_and_a_refused_start_leaves_it(data, workdir):
    text = (workdir / "exit.json").read_text()
    told = json.loads(text)
    assert (told["code"], told["reason"], told["last_step"]) == (0, "all 12 steps are done", 12)
    first, second = told["history"]
    steps = [(line["step"], line["loss"]) for line in told["steps"]]
    assert steps == run_losses(workdir)[second["step"] :]
    assert first["step"] == 0 and second["changes"] == {"config.data.flip": [0.0, 0.5]}
    assert told["config"]["data"]["flip"] == 0.5 and told["devices"] == "8 cpu"
    assert {"python", "jax", "clip_jax"} <= set(told["versions"]) and "commit" in told
    with pytest.raises(UserError, match=r"config\.seed = 0 and now it is 1"):
        main.run(config_of(data, data__flip=0.5, seed=1), str(workdir))
    assert (workdir / "exit.json").read_text() == text


def test_steps_that_cannot_be_made_are_named(workdir):
    with pytest.raises(UserError, match="--step 13: the run has 12 steps"):
        replay(workdir, 13)
    with pytest.raises(UserError, match="steps count from 1"):
        replay(workdir, 0)
    with pytest.raises(UserError, match="is not a work folder"):
        replay(workdir / "checkpoints", 1)


def test_what_is_not_finite_is_found_where_it_arose(workdir, tmp_path, monkeypatch):
    init_of_run = replay_module.init_of_run

    def broken(*args):
        def init():
            state = init_of_run(*args)()
            kernel = state.params["visual"]["transformer"]["resblocks_0"]["mlp"]["c_fc"]["kernel"]
            state.params["visual"]["transformer"]["resblocks_0"]["mlp"]["c_fc"]["kernel"] = (
                kernel * jnp.inf
            )
            return state

        return init

    monkeypatch.setattr(replay_module, "init_of_run", broken)
    found = replay(workdir, 1)
    assert found.not_finite["the state before the step"].endswith("resblocks_0/mlp/c_fc/kernel")
    assert found.not_finite["forward"] == "visual/transformer/resblocks_0/mlp/c_fc"
    assert {"the loss", "backward"} <= set(found.not_finite) and not found.metrics["finite"]
    text = write_replay(found, tmp_path / "out")[0].read_text()
    json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    logged = {"loss": json.loads(text)["metrics"]["loss"]}
    assert dataclasses.replace(found, logged=logged).is_equal
    text = replay_text(found)
    assert "\nnot finite first: the state before the step, " in text
    assert "\nthen: forward, visual/transformer/resblocks_0/mlp/c_fc" in text
    with pytest.raises(UserError, match="step 1 is not finite and ends the run; give --step 1"):
        replay(workdir, 2)


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
