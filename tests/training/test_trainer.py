"""Whole runs on genuine shards: resuming bit for bit, any mesh, bad input, signals, evaluation."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from pairs import NAMES, run_losses, tiny_config, write_data
from quick import QUICK
from service_stand_in import put_stand_in
from tiny import CONVNET, ONE_LAYER
from tiny import SHALLOW as VIT

import clip_jax
from clip_jax import main
from clip_jax.data import decode_processes
from clip_jax.data.images import Preprocess
from clip_jax.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError
from clip_jax.models import zoo
from clip_jax.pretrained.work_folder import RunDescription
from clip_jax.tokenizers import make_tokenizer
from clip_jax.tokenizers.train import train as train_tokenizer
from clip_jax.tools.evaluate import evaluate_workdir, evaluation_text
from clip_jax.training import run_logger, trainer
from clip_jax.training.batch_feed import BatchFeed
from clip_jax.training.best_checkpoint import BestCheckpoint
from clip_jax.training.checkpoint import Checkpoints, meta_check
from clip_jax.training.history import read_history
from clip_jax.training.state import TrainState

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(zoo.MODELS, "tiny", ONE_LAYER)


def make_config(data, **changes):
    return tiny_config(data, **{"train__steps": 12, "checkpoint__every": 5} | changes)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, "tiny", ONE_LAYER)
        assert main.run(make_config(data), str(workdir)) == 0
    return workdir


def test_evaluation_during_a_run_changes_no_loss_and_its_best_state_is_kept(
    data, uninterrupted, tmp_path, monkeypatch, capsys
):
    folder, pattern = data
    sent = put_stand_in(tmp_path, monkeypatch)
    config = make_config(
        data,
        eval__data=pattern,
        eval__classnames=str(folder / "names.txt"),
        eval__every=5,
        eval__best="mean_per_class_recall",
        train__compile_ahead="all",
        train__report_to="trackio",
        data__threads=-1,
    )
    monkeypatch.setattr(decode_processes, "usable_cores", lambda: 3)
    assert main.run(config, str(tmp_path)) == 0
    written = json.loads((tmp_path / "config.json").read_text())["config"]
    assert written["data"]["threads"] == -1
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    final = {f"eval/{name}": x for row in results for name, x in row["metrics"].items()}
    reported = [json.loads(line) for line in sent.read_text().splitlines()]
    assert reported[-2:] == [{"step": 12} | final, {"finished": True}]
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "eval/acc1" in line}
    assert list(found) == [5, 10]
    assert 0 <= found[5]["eval/acc1"] <= 1 and "eval/image_retrieval_recall@5" in found[10]
    out = capsys.readouterr().out
    assert "step 5 evaluated:" in out and "shards, decoded by 3 threads; 12 steps of" in out
    kept = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert kept == run_losses(uninterrupted)
    best = Checkpoints(tmp_path / "best", read_only=True)
    values = {step: line["eval/mean_per_class_recall"] for step, line in found.items()}
    assert best.steps() == [max(values, key=values.__getitem__)]  # the earliest of equal ones
    meta = best.latest_meta()
    assert meta["metrics"]["mean_per_class_recall"] == values[meta["step"]]
    assert clip_jax.load(str(tmp_path / "best")).config == clip_jax.load(str(tmp_path)).config


def test_the_best_is_kept_over_a_restart_and_a_wrong_metric_is_named(tmp_path, capsys):
    about = RunDescription("tiny", VIT, None, Preprocess(), config={})
    one = {"x": jnp.ones(2)}
    states = {step: TrainState(jnp.int32(step), one, {}, one, {}) for step in (1, 2, 3)}
    with BestCheckpoint(tmp_path, "acc1", about) as best:
        best.offer(states[1], 1, {"acc1": 0.5}, {})
    with BestCheckpoint(tmp_path, "acc1", about) as best:
        best.offer(states[2], 2, {"acc1": 0.5}, {})
        best.offer(states[3], 3, {"acc1": 0.6}, {})
        with pytest.raises(UserError, match="'acc1'; the evaluations during the run measure acc5"):
            best.offer(states[3], 3, {"acc5": 0.6}, {})
    assert Checkpoints(tmp_path / "best", read_only=True).steps() == [3]
    assert capsys.readouterr().out.count("best so far") == 2


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Raise a signal while the metrics of a step are read."""
    original = run_logger.RunLogger.log_step

    def spy(self, at, *args):
        if at == step:
            signal.raise_signal(number)
        return original(self, at, *args)

    monkeypatch.setattr(run_logger.RunLogger, "log_step", spy)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, EXIT_TERMINATED), (signal.SIGINT, EXIT_INTERRUPTED)]
)
def test_stopped_and_run_again_is_the_same_to_the_last_digit(
    data, uninterrupted, tmp_path, monkeypatch, capsys, number, code
):
    sent = put_stand_in(tmp_path, monkeypatch)
    config = make_config(data, train__report_to="trackio")
    with monkeypatch.context() as patch:
        stop_at(patch, 7, number)
        assert main.run(config, str(tmp_path)) == code
    out = capsys.readouterr().out
    assert "the same command goes on from there" in out
    assert re.search(r"first step done [\d.]+ s after the start; \d programs compiled, ", out)
    stopped = run_losses(tmp_path)
    assert 7 <= stopped[-1][0] < 12
    assert main.run(config, str(tmp_path)) == 0
    assert f"going on from step {stopped[-1][0]}" in capsys.readouterr().out
    assert run_losses(tmp_path) == run_losses(uninterrupted)
    reported = [json.loads(line) for line in sent.read_text().splitlines()]
    assert len({line["name"] for line in reported if "name" in line}) == 1
    assert [(x["step"], x["loss"]) for x in reported if "loss" in x] == run_losses(uninterrupted)
    # Each start says once how long it took; of the second, the step alone is a program, and read.
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    starts = {line["step"]: line for line in lines if "startup/first_step_seconds" in line}
    assert list(starts) == [1, stopped[-1][0] + 1]
    second = starts[stopped[-1][0] + 1]
    assert (second["startup/programs_compiled"], second["startup/programs_read"]) == (0, 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_killed_run_goes_on_from_its_last_checkpoint(data, uninterrupted, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    original = run_logger.RunLogger.log_step

    def die(self, at, *args):
        if at == 8:
            raise Killed
        return original(self, at, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_logger.RunLogger, "log_step", die)
        main.run(make_config(data), str(tmp_path))
    assert run_losses(tmp_path)[-1][0] == 7
    assert main.run(make_config(data), str(tmp_path)) == 0
    assert run_losses(tmp_path) == run_losses(uninterrupted)


def test_an_error_of_the_data_costs_no_step(data, uninterrupted, tmp_path, monkeypatch, capsys):
    original = BatchFeed.place_next

    def fail(self):
        fail.calls += 1
        if fail.calls == 4:
            raise UserError("the disk is gone")
        return original(self)

    fail.calls = 0
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is gone"):
        patch.setattr(BatchFeed, "place_next", fail)
        main.run(make_config(data), str(tmp_path))
    # The fourth batch is asked for while the third step is under way, before any is saved.
    assert run_losses(tmp_path) == run_losses(uninterrupted)[:3]
    assert main.run(make_config(data), str(tmp_path)) == 0
    assert "going on from step 3" in capsys.readouterr().out
    assert run_losses(tmp_path) == run_losses(uninterrupted)


@pytest.mark.slow
def test_augmented_images_and_captions_are_the_same_after_a_resume(data, tmp_path, monkeypatch):
    """Decoded by processes there, by threads before."""
    fields = {
        "model__drop_path": 0.5,
        "model__text_drop_path": 0.5,
        "data__captions": ("*=1", ".txt=1"),
        "data__word_dropout": 0.3,
        "data__negatives": "*",
        "data__rand_augment": 2,
        "data__random_erasing": 0.5,
        "data__erasing_mode": "pixel",
    }
    config = make_config(data, **fields)
    assert main.run(config, str(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert main.run(config, str(tmp_path / "stopped")) == EXIT_TERMINATED
    other = make_config(data, data__processes=2, **fields)
    assert main.run(other, str(tmp_path / "stopped")) == 0
    assert run_losses(tmp_path / "stopped") == run_losses(tmp_path / "whole")
    changed = make_config(data, **fields | {"data__word_dropout": 0.2})
    with pytest.raises(UserError, match=r"config\.data\.word_dropout = 0\.3 and now it is 0\.2"):
        main.run(changed, str(tmp_path / "whole"))


def test_finished_runs_do_nothing_more(data, uninterrupted):
    before = run_losses(uninterrupted)
    assert main.run(make_config(data), str(uninterrupted)) == 0
    assert run_losses(uninterrupted) == before


@pytest.mark.parametrize("fsdp,tensor", [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_another_mesh_gives_the_same_losses(data, uninterrupted, tmp_path, fsdp, tensor):
    config = make_config(data, mesh__fsdp=fsdp, mesh__tensor=tensor)
    assert main.run(config, str(tmp_path)) == 0
    got, want = np.array(run_losses(tmp_path)), np.array(run_losses(uninterrupted))
    # Float32 sums in another order, over 12 steps.
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-5)


def test_metrics_hold_what_a_run_is_judged_by(uninterrupted):
    lines = (uninterrupted / "metrics.jsonl").read_text().splitlines()
    line = json.loads(lines[-1])
    wanted = {"step", "loss", "grad_norm", "learning_rate", "logit_scale", "scale", "mfu"}
    wanted |= {"image_accuracy", "text_accuracy", "pairs_per_second", "ok"}
    assert wanted <= set(line)
    assert line["ok"] == 1 and 0 < line["mfu"] < 1
    assert "unpacked" not in line
    assert list(uninterrupted.glob("events.out.tfevents.*"))


# The sigmoid loss starts from a bias of -10, which it has to climb from.
@pytest.mark.parametrize(
    ("loss", "steps"), [("softmax", 80), pytest.param("sigmoid", 200, marks=pytest.mark.slow)]
)
def test_a_run_learns_evaluates_and_loads(data, tmp_path, loss, steps, capsys):
    folder, pattern = data
    config = make_config(
        data,
        train__loss=loss,
        train__steps=steps,
        train__batch_size=32,
        train__log_every=20,
        checkpoint__every=1000,
        eval__data=pattern,
        eval__classnames=str(folder / "names.txt"),
        eval__templates=("{}",),
        eval__batch_size=40,
    )
    assert main.run(config, str(tmp_path)) == 0
    results = json.loads((tmp_path / "eval.json").read_text())
    metrics = {r["task"]: r["metrics"] for r in results["results"]}
    # Twelve things in four colors: chance is 8 %.
    assert metrics["zeroshot_classification"]["acc1"] > 0.5
    assert {
        f"{kind}_retrieval_recall@{k}" for kind in ("image", "text") for k in (1, 5, 10)
    } <= set(metrics["zeroshot_retrieval"])
    for name in ("predictions.png", "loss.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert "acc1" in capsys.readouterr().out

    clip = clip_jax.load(tmp_path)
    again = evaluate_workdir(str(tmp_path), templates=["{}"])
    assert json.loads((tmp_path / "eval.json").read_text()) == results
    assert "acc1" in evaluation_text(again)
    assert clip.tokenizer.vocab_size == 280
    assert clip_jax.load(tmp_path, tokenizer="clip").tokenizer.vocab_size == 49_408
    tokens = clip.tokenize(NAMES)
    assert clip.encode_text(tokens).shape == (12, 16)


def test_not_finite_stops_with_the_step_the_keys_and_the_last_checkpoint(
    data, tmp_path, monkeypatch, capsys
):
    from clip_jax.training import setup

    make_loader = setup.make_loader

    def poisoned(*args):
        loader = make_loader(*args)
        original = type(loader).__next__

        class Poisoned:
            count = 0

            def __getattr__(self, name):
                return getattr(loader, name)

            def __enter__(self):
                loader.__enter__()
                return self

            def __exit__(self, *exc):
                return loader.__exit__(*exc)

            def __next__(self):
                self.count += 1
                batch = original(loader)
                # The step's own guard is what is tried here: images cannot hold a NaN.
                return batch | (
                    {"image": batch["image"].astype(np.float32) * np.nan} if self.count == 8 else {}
                )

        return Poisoned()

    monkeypatch.setattr(trainer, "make_loader", poisoned)
    assert main.run(make_config(data), str(tmp_path)) == EXIT_ERROR
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert "step 8 is not finite (loss nan)" in line
    assert f"last good checkpoint: step 5 in {tmp_path}" in line
    told = json.loads((tmp_path / "not_finite.json").read_text())
    assert told["step"] == 8 and len(told["keys"]) == 16
    assert told["keys"][0] in line and told["keys"][0].count("/") == 1
    assert run_losses(tmp_path)[-1][0] == 7
    hint = f"to look into it: python -m clip_jax.replay {tmp_path} --step 8"
    assert line.endswith(hint)
    end = json.loads((tmp_path / "exit.json").read_text())
    assert (end["code"], end["reason"]) == (EXIT_ERROR, f"step 8 is not finite; {hint}")
    assert end["steps"][-1]["loss"] == "NaN"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "config.seed = 0 and now it is 1"),
        ({"train__batch_size": 32}, "config.train.batch_size = 16 and now it is 32"),
        ({"train__mask_equal_captions": False}, "mask_equal_captions = true and now it is false"),
        ({"optim__learning_rate": 1e-3}, "config.optim.learning_rate = 0.003 and now it is 0.001"),
        ({"model__name": "tiny2"}, 'config.model.name = "tiny" and now it is "tiny2"'),
        ({"data__train": "ONE SHARD"}, "number of training pairs = 96 and now it is 48"),
    ],
)
def test_another_runs_work_folder_is_refused(data, uninterrupted, monkeypatch, changes, message):
    monkeypatch.setitem(zoo.MODELS, "tiny2", dataclasses.replace(ONE_LAYER, embed_dim=8))
    if "data__train" in changes:
        changes = {"data__train": str(data[0] / "00000.tar")}
    before = sorted(p.name for p in (uninterrupted / "checkpoints").iterdir())
    with pytest.raises(UserError) as caught:
        main.run(make_config(data, **changes), str(uninterrupted))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == before


def test_another_tokenizer_is_refused_until_it_is_allowed(data, uninterrupted, tmp_path):
    """As many ids, other meanings: every checkpoint would load with wrong ones."""
    workdir, other = tmp_path / "run", tmp_path / "other.model"
    shutil.copytree(uninterrupted, workdir)
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(name[::-1] for name in NAMES) + "\n")
    train_tokenizer(str(captions), str(other), 280)
    mine = workdir / "tokenizer.model"
    before = mine.read_bytes()
    assert make_tokenizer(str(other)).vocab_size == make_tokenizer(str(mine)).vocab_size
    config = make_config(data, data__tokenizer=str(other), train__steps=13)
    with pytest.raises(UserError, match=r"fingerprint = .*--allow-change config\.data\.tokenizer"):
        main.run(config, str(workdir))
    assert mine.read_bytes() == before
    assert main.run(config, str(workdir), allow_change=["config.data.tokenizer"]) == 0
    assert mine.read_bytes() == other.read_bytes()
    first, *_, second = read_history(workdir)  # another test may have gone on from its end
    assert (first["step"], first["changes"], second["step"]) == (0, {}, 12)
    assert set(second["changes"]) == {
        "the tokenizer's fingerprint",
        "config.data.tokenizer",
        "config.train.steps",
    }
    assert second["changes"]["config.train.steps"] == [12, 13]


def test_a_run_of_an_earlier_version_goes_on(data, uninterrupted, tmp_path, capsys):
    """Its checkpoints do not say what it was optimized with; its config.json does."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    for path in workdir.glob("checkpoints/*/meta/metadata"):
        meta = json.loads(path.read_text())
        saved = meta["fingerprint"]
        meta["fingerprint"] = {
            key: value
            for key, value in saved.items()
            if not key.startswith("config.optim") and "tokenizer" not in key
        }
        assert len(meta["fingerprint"]) < len(saved)
        path.write_text(json.dumps(meta | {"check": meta_check(meta)}))
    with pytest.raises(UserError, match=r"config\.optim\.learning_rate = 0\.003 and now"):
        main.run(make_config(data, optim__learning_rate=1e-3), str(workdir))
    assert main.run(make_config(data, train__steps=13), str(workdir)) == 0
    assert "going on from step 12" in capsys.readouterr().out


def test_a_run_without_a_readable_checkpoint_does_not_begin_again(data, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    for path in workdir.glob("checkpoints/*/meta/metadata"):
        path.write_text(path.read_text().replace("fingerprint", "fingerprant"))
    with pytest.raises(UserError, match=r"none of the \d checkpoints in .* can be read"):
        main.run(make_config(data), str(workdir))


def test_data_that_is_not_there(data, tmp_path):
    with pytest.raises(UserError, match=r"nothing-\{0\.\.1\}\.tar"):
        main.run(make_config(data, data__train="nothing-{0..1}.tar"), str(tmp_path))
    with pytest.raises(UserError, match=r"config\.data\.train is empty"):
        main.run(make_config(data, data__train=""), str(tmp_path))


def test_a_work_folder_that_cannot_be(data, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for bad in (file, file / "below"):
        with pytest.raises(UserError, match=f"--workdir {bad} cannot be made .*; give another"):
            main.run(make_config(data), str(bad))
        # Shards that are left out would be listed there.
        missing = make_config(data, data__train=f"{data[0]}/{{00000..00002}}.tar")
        with pytest.raises(UserError, match=f"--workdir {bad} cannot be made .*; give another"):
            main.run(missing, str(bad))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written to"):
        main.run(make_config(data), str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__name": "tiny-conv"}, "tiny-conv has no patches to drop"),
        ({"train__freeze": "image"}, "a frozen tower sees whole images"),
    ],
)
def test_patches_that_cannot_be_dropped(data, tmp_path, monkeypatch, changes, message):
    """Said before anything of the run is written."""
    monkeypatch.setitem(zoo.MODELS, "tiny-conv", CONVNET)
    with pytest.raises(UserError, match=message):
        main.run(make_config(data, model__patch_dropout=0.5, **changes), str(tmp_path))
    # Nothing of a run: the data alone was counted.
    assert {path.name for path in tmp_path.iterdir()} <= {
        "data_index.json",
        "exit.json",
        "run.lock",
    }


def test_a_shard_cut_in_half(data, tmp_path):
    shard = tmp_path / "half.tar"
    whole = (data[0] / "00000.tar").read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"half\.tar is cut or damaged"):
        main.run(make_config(data, data__train=str(shard)), str(tmp_path / "run"))


def test_a_text_file_named_jpg_is_skipped_counted_and_named(data, tmp_path, capsys):
    import webdataset

    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar")) as writer:
        writer.write({"__key__": "not-a-picture", "jpg": b"hello", "txt": "red dot"})
        writer.write({"__key__": "no-words", "png": (ROOT / "tests/pairs.py").read_bytes()})
    pattern = f"{data[0]}/00000.tar::{folder}/0.tar"
    config = make_config(data, data__train=pattern, train__steps=0, train__epochs=1.0)
    assert main.run(config, str(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "1 samples have no caption and are left out, first 0.tar/no-words" in out
    assert "1 not_an_image" in out and "not-a-picture" in out
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped/not_an_image"] == 1


def test_command_line_to_the_end(data, tmp_path):
    """The real entry points as a user calls them, on one device."""
    folder, pattern = data
    environment = {**os.environ, "XLA_FLAGS": QUICK}

    def call(module, *args):
        return subprocess.run(
            [sys.executable, "-m", module, *args],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )

    workdir = str(tmp_path / "run")
    done = call(
        "clip_jax.main",
        "--config=experiments/emoji.py",
        f"--workdir={workdir}",
        "--config.train.steps=2",
        "--config.train.batch_size=8",
        f"--config.data.train={pattern}",
        f"--config.data.tokenizer={folder}/t.model",
        "--config.eval.data=",
    )
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert done.stdout.count("attention: image tower none, text tower xla") == 1
    missing = call("clip_jax.evaluate", "--workdir", workdir)
    assert missing.returncode == 2 and missing.stderr.startswith("error: ")
    assert "names no evaluation data; give --data" in missing.stderr
    done = call(
        "clip_jax.evaluate",
        "--workdir",
        workdir,
        "--data",
        pattern,
        "--classnames",
        f"{folder}/names.txt",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "eval.json").exists()
    done = call(
        "clip_jax.main", "--config=experiments/emoji.py", "--dry-run",
        f"--config.data.tokenizer={folder}/t.model",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("image tower", "mesh", "per device", '"seed": 0'):
        assert word in done.stdout
