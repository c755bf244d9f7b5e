"""Trials of a second each, in one process: `python -m faults.inside KIND COUNT SEED ...`."""

import contextlib
import io
import json
import random
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_collections
from pairs import run_losses
from random_configs import mutated

from clip_jax.errors import UserError, short

GOLDEN = Path(__file__).parents[1] / "golden"
SLOW = 20.0
"""Seconds that no single file may take."""

Outcome = tuple[bool, str]


def damages(
    count: int, seed: int, experiment: Path, whole: Path, pattern: str
) -> Iterator[Outcome]:
    """Damage one file of the newest checkpoint; the run goes on from it or from the one before."""
    from clip_jax import main
    from clip_jax.config import resolve
    from faults.kinds import _damage
    from faults.trials import EVERY, STEPS

    config = runpy.run_path(str(experiment))["get_config"]()
    config.train.steps, config.checkpoint.every = STEPS, EVERY
    resolved, losses, rng = resolve(config), run_losses(whole), random.Random(seed)
    newest = STEPS - EVERY
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            workdir = Path(folder) / str(number)
            shutil.copytree(whole, workdir)
            shutil.rmtree(workdir / "checkpoints" / str(STEPS))
            files = sorted((workdir / "checkpoints" / str(newest)).glob(pattern))
            path = rng.choice([file for file in files if file.is_file()])
            if pattern == "meta/*":
                data = bytearray(path.read_bytes())
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                path.write_bytes(data)
                what = "bit of meta"
            else:
                kind = path.relative_to(workdir / "checkpoints" / str(newest)).parts[0]
                what = f"{kind}: {_damage(path, rng)}"
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                code = main.run(resolved, str(workdir))
            is_right = code == 0 and run_losses(workdir) == losses
            start = newest if f"going on from step {newest}" in said.getvalue() else newest - EVERY
            yield is_right, f"{what}: went on from {'it' if start == newest else 'the one before'}"
            shutil.rmtree(workdir)


def mutants(count: int, seed: int) -> Iterator[Outcome]:
    """Change bytes of other programs' checkpoints and read them."""
    from clip_jax.pretrained.load import read_arrays

    rng = random.Random(seed)
    files = [path for path in GOLDEN.rglob("*") if path.suffix in (".pt", ".safetensors", ".npz")]
    files = [path for path in files if path.stat().st_size < 1 << 20]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            source = rng.choice(files)
            data = bytearray(source.read_bytes())
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
            if rng.random() < 0.1:
                del data[rng.randrange(len(data)) :]
            path = Path(folder) / f"x{source.suffix}"
            path.write_bytes(data)
            yield _read(lambda path=path: [array.sum() for array in read_arrays(path).values()])


def _read(function: Callable[[], object]) -> Outcome:
    begin = time.monotonic()
    try:
        function()
        outcome = True, "read"
    except UserError as error:
        outcome = "\n" not in str(error), "refused in a line"
    except Exception as error:
        outcome = False, short(error)[:200]
    if time.monotonic() - begin > SLOW:
        return False, "slow"
    return outcome


def configs(count: int, seed: int) -> Iterator[Outcome]:
    """Read configs of runs and of models with random values."""
    from clip_jax.config import default, resolve
    from clip_jax.models.zoo import MODELS
    from clip_jax.pretrained.hf_config import config_from_hf
    from clip_jax.pretrained.open_clip_config import config_from_open_clip
    from clip_jax.pretrained.work_folder import model_to_json, read_description

    rng, values = random.Random(seed), default()
    values.train.steps, values.data.train = 10, "x.tar"
    plain = values.to_dict()
    published = GOLDEN / "published"
    hf = [json.loads(path.read_text()) for path in published.glob("hf_*/config.json")]
    path = published / "open_clip" / "open_clip_config.json"
    open_clip = json.loads(path.read_text())["model_cfg"]
    models = [model_to_json(config) for config in MODELS.values()]

    def describe(folder: Path) -> None:
        whole = {"model_name": "x", "model": rng.choice(models), "config": {}}
        whole |= {"tokenizer": {"kind": "clip"}, "preprocess": {}}
        (folder / "config.json").write_text(json.dumps(mutated(whole, rng)))
        read_description(folder)

    with tempfile.TemporaryDirectory() as folder:
        readers = [
            lambda: resolve(ml_collections.ConfigDict(mutated(plain, rng))),
            lambda: describe(Path(folder)),
            lambda: config_from_hf(mutated(rng.choice(hf), rng), "config.json"),
            lambda: config_from_open_clip(mutated(open_clip, rng), "open_clip_config.json"),
        ]
        for number in range(count):
            yield _read(readers[number % len(readers)])


def main() -> None:
    """Make the trials, and write a line of JSON for what came of each."""
    kind, count, seed, experiment, whole = sys.argv[1:]
    work = int(count), int(seed)
    trials = {
        "damage": lambda: damages(*work, Path(experiment), Path(whole), "**/*"),
        "meta": lambda: damages(*work, Path(experiment), Path(whole), "meta/*"),
        "mutants": lambda: mutants(*work),
        "configs": lambda: configs(*work),
    }[kind]()
    out, sys.stdout = sys.stdout, sys.stderr
    for outcome in trials:
        print(json.dumps(outcome), file=out, flush=True)


if __name__ == "__main__":
    main()
