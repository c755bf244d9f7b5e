"""Whole runs that tune: one that is extended past its cool-down, a kept task, the curve between."""

import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import run_losses, tiny_config, write_data
from tiny import ONE_LAYER

import clip_jax
from clip_jax import main
from clip_jax.errors import UserError
from clip_jax.evaluation.interpolate import CurvePoint, best_point, interpolate
from clip_jax.models import zoo
from clip_jax.report_page.page import write_report
from clip_jax.tools import wiseft
from clip_jax.training.history import read_history
from clip_jax.training.kept_task import KeptTask
from clip_jax.typing import leaves_by_path

COOLED = {
    "optim__schedule": "constant",
    "optim__warmup_steps": 0,
    "optim__cooldown_steps": 3,
    "checkpoint__every": 100,
    "checkpoint__keep": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True, scope="module")
def tiny_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, "tiny", ONE_LAYER)
        yield


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A run of 6 steps that is then made 9 long, and one that was 9 long from the beginning."""
    extended, long = (tmp_path_factory.mktemp(name) for name in ("extended", "long"))
    for folder, steps in ((extended, 6), (extended, 9), (long, 9)):
        config = tiny_config(data, train__steps=steps, **COOLED)
        assert main.run(config, str(folder)) == 0
    return extended, long


@pytest.mark.slow
def test_a_run_is_extended_from_the_state_before_its_cool_down(runs):
    extended, long = runs
    last = dict(run_losses(extended))
    assert [last[step] for step in range(1, 10)] == [loss for _, loss in run_losses(long)]
    one, other = (clip_jax.load(folder).params for folder in runs)
    chex.assert_trees_all_equal(one, other)
    assert [(start["step"], start["steps"]) for start in read_history(extended)] == [(0, 6), (3, 9)]
    assert "config.train.steps" in read_history(extended)[1]["changes"]
    assert (extended / "cooled" / "6").is_dir()


@pytest.mark.slow
def test_the_curve_between_two_models(runs, data, tmp_path, capsys):
    """A tool's run on two of the same sizes: here twice the same, which no alpha changes."""
    folder, pattern = data
    names = str(folder / "names.txt")
    flags = ["--data", pattern, "--keep-data", pattern, "--classnames", names, "--alphas", "0.5,1"]
    extended, long = map(str, runs)
    assert wiseft.main([extended, long, *flags, "--save", str(tmp_path / "best")]) == 0
    assert "best" in capsys.readouterr().out
    curve = json.loads((runs[1] / "wiseft.json").read_text())
    assert [point["alpha"] for point in curve["points"]] == [0, 0.5, 1]
    assert len({point["new"]["acc1"] for point in curve["points"]}) == 1
    saved = leaves_by_path(clip_jax.load(tmp_path / "best").params)
    for name, x in leaves_by_path(clip_jax.load(long).params).items():
        np.testing.assert_array_equal(saved[name], x)
    assert "Between start and end" in write_report([long]).read_text()
    with pytest.raises(UserError, match="each lies in"):
        wiseft.main([extended, long, *flags[:-1], "2"])
    with pytest.raises(UserError, match="--metric nothing: there are acc1, "):
        wiseft.main([extended, long, *flags, "--metric", "nothing"])
    with pytest.raises(UserError, match="best holds something already"):
        wiseft.main([extended, long, *flags, "--save", str(tmp_path / "best")])


def test_the_best_point_loses_no_more_than_it_may():
    curve = [(0.0, 0.5, 0.8), (0.5, 0.6, 0.795), (1.0, 0.7, 0.7)]
    points = [CurvePoint(a, {"acc1": new}, {"acc1": kept}) for a, new, kept in curve]
    assert best_point(points, "acc1", 0.01).alpha == 0.5
    assert best_point(points, "acc1", 0.2).alpha == 1
    start, end = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    assert interpolate(start, end, 0.0) is start and interpolate(start, end, 1.0) is end
    np.testing.assert_allclose(interpolate(start, end, 0.25)["a"], 0.25)


def test_a_kept_task_is_measured_once_and_watched(tmp_path):
    values = iter([{"acc1": 0.8}, {"acc1": 0.79}, {"acc1": 0.7}])
    kept = KeptTask(lambda variables: next(values), tmp_path, "acc1", 0.05)
    kept.begin({})
    assert not kept.is_lost(kept.measure({}))
    # A run that goes on compares with its beginning.
    again = KeptTask(lambda variables: next(values), tmp_path, "acc1", 0.05)
    again.begin({})
    metrics = again.measure({})
    assert metrics == {"keep_acc1": 0.7} and again.is_lost(metrics)
    with pytest.raises(UserError, match="is watched by nothing"):
        KeptTask(lambda variables: {"acc1": 1.0}, tmp_path, "nothing", 0.1).begin({})


@pytest.mark.slow
def test_a_run_ends_where_it_has_forgotten_too_much(data, tmp_path, monkeypatch, capsys):
    folder, pattern = data
    config = tiny_config(
        data,
        train__steps=8,
        eval__data=pattern,
        eval__classnames=str(folder / "names.txt"),
        eval__tasks=("zeroshot_classification",),
        eval__keep=pattern,
        eval__every=2,
    )
    monkeypatch.setattr(KeptTask, "is_lost", lambda kept, metrics: "keep_acc1" in metrics)
    assert main.run(config, str(tmp_path / "run")) == 0
    assert "at step 2 keep_acc1 is more than config.eval.keep_loss" in capsys.readouterr().out
    assert clip_jax.load(tmp_path / "run") and (tmp_path / "run" / "keep.json").exists()
