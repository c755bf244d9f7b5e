"""Configs: defaults, overrides, and one clear line for every mistake."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax.config import default, known_keys, resolve, unknown_key_message
from clip_jax.errors import UserError
from clip_jax.models.zoo import MODELS
from clip_jax.sections import Config
from clip_jax.training.optimizer import SCALERS

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(p.name for p in (ROOT / "experiments").glob("*.py") if p.name != "paper.py")


def small():
    config = default()
    config.train.steps = 10
    return config


def test_defaults_resolve_to_the_frozen_config():
    resolved = resolve(small())
    assert resolved == Config(train=resolved.train)
    with pytest.raises(AttributeError):
        resolved.seed = 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_resolves(name):
    config = resolve(runpy.run_path(str(ROOT / "experiments" / name))["get_config"]())
    assert config.model.name in MODELS
    assert config.data.train


# Radford et al. 2021, tables 18 to 20.
@pytest.mark.parametrize(
    ("file", "model", "learning_rate", "beta2", "eps"),
    [
        ("vit_b32", "ViT-B/32", 5e-4, 0.98, 1e-6),
        ("vit_b16", "ViT-B/16", 5e-4, 0.98, 1e-6),
        ("vit_l14", "ViT-L/14", 4e-4, 0.98, 1e-6),
        ("vit_l14_336", "ViT-L/14@336px", 2e-5, 0.98, 1e-6),
        ("rn50", "RN50", 5e-4, 0.999, 1e-8),
        ("rn101", "RN101", 5e-4, 0.999, 1e-8),
        ("rn50x4", "RN50x4", 5e-4, 0.999, 1e-8),
        ("rn50x16", "RN50x16", 4e-4, 0.999, 1e-8),
        ("rn50x64", "RN50x64", 3.6e-4, 0.999, 1e-8),
    ],
)
def test_the_papers_hyper_parameters(file, model, learning_rate, beta2, eps):
    path = str(ROOT / "experiments" / f"{file}.py")
    c = resolve(runpy.run_path(path)["get_config"]())
    assert (c.model.name, c.optim.learning_rate) == (model, learning_rate)
    assert (c.optim.beta1, c.optim.beta2, c.optim.eps) == (0.9, beta2, eps)
    assert (c.train.batch_size, c.optim.warmup_steps, c.optim.weight_decay) == (32_768, 2000, 0.2)
    assert c.train.epochs == (1 if file == "vit_l14_336" else 32)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("train", "steps", 0, "exactly one of them"),
        ("train", "epochs", 3.0, "exactly one of them"),
        ("train", "batch_size", 0, "batch_size is 0"),
        ("train", "batch_size", 100, "not a multiple of config.data.streams 8"),
        ("train", "loss", "hinge", "one of softmax, sigmoid"),
        ("train", "freeze", "both", 'one of "", image, text'),
        ("optim", "learning_rate", float("inf"), "learning_rate is inf; it takes a finite number"),
        ("data", "crop_scale", (0.5, float("nan")), "crop_scale[1] is nan; it takes a finite"),
        ("optim", "name", "sgd", f"one of {', '.join(SCALERS)}"),
        ("model", "dtype", "float16", "one of float32, bfloat16"),
        ("model", "attention", "flash", "one of auto, xla, cudnn"),
        ("model", "remat", "some", "one of auto, none, minimal, dots, blocks, full"),
        ("data", "crop_scale", (0.5, 1.5), "0 < low <= high <= 1"),
        ("data", "crop_scale", (0.5,), "it takes 2"),
        ("data", "threads", 0, "config.data.threads is 0; above 0, or -1 for every core"),
        ("data", "threads", -2, "config.data.threads is -2; it takes -1 to 4,096"),
        ("data", "processes", 5, "config.data.processes is 5; it takes -1 to 4, the number of"),
        ("mesh", "fsdp", 0, "config.mesh.fsdp is 0"),
        ("mesh", "data", 0, "config.mesh.data is 0"),
        ("eval", "data", "x.tar", "config.eval.classnames names no file"),
        ("eval", "tasks", ("guessing",), "config.eval.tasks is 'guessing'; it must be one of zero"),
        ("eval", "tasks", ("knn",), "config.eval.train_data names no shards"),
        ("eval", "templates", ("a photo",), "needs a {}"),
    ],
)
def test_impossible_values_are_one_line(section, key, value, message):
    config = small()
    config[section][key] = value
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        resolve(config)
    assert "\n" not in str(caught.value)


def test_unknown_and_missing_keys():
    config = small().unlock()
    config.train.stepz = 3
    with pytest.raises(UserError, match=r"config.train.stepz does not exist; did you mean config"):
        resolve(config)
    config = small().unlock()
    del config.train["loss"]
    with pytest.raises(UserError, match=r"config.train.loss is missing"):
        resolve(config)
    assert "did you mean config.train.steps?" in unknown_key_message("train.step")
    assert "see clip_jax/sections.py" in unknown_key_message("zzz")
    assert {"seed", "train.steps", "mesh.fsdp"} < set(known_keys())


@pytest.mark.parametrize("mistake", ["config.train.stepz = 3", "config.data.train = 3"])
def test_a_wrong_key_or_type_is_refused_before_jax_is_imported(mistake):
    code = f"""
import sys
from clip_jax.config import default, resolve
from clip_jax.errors import UserError
config = default().unlock()
{mistake}
try:
    resolve(config)
except UserError:
    assert "jax" not in sys.modules
else:
    raise SystemExit("not refused")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def command(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "clip_jax.main", *args], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.train.stepz=3"], "did you mean config.train.steps?"),
        (["--config.train.steps=abc"], "invalid literal for int"),
        (["--workdri=x"], "Unknown command line flag 'workdri'"),
        (["surplus"], "unexpected argument 'surplus'"),
        (["--num-processes=2", "--dry-run"], "--coordinator and --process-id are missing"),
        # As earlier versions spelled them.
        (["--process_id=1", "--dry_run"], "--coordinator and --num-processes are missing"),
        (["--local_device_ids=a", "--dry_run"], "--local-device-ids a: numbers with commas"),
        ([], "--workdir is missing"),
    ],
)
def test_mistakes_on_the_command_line(args, message):
    done = command("--config", "experiments/vit_b32.py", *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_missing_experiment_file():
    done = command("--config", "experiments/nothing.py", "--workdir", "x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "experiments/nothing.py" in done.stderr
