"""The kinds of faults."""

import json
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pairs import run_losses
from run_tiny import ROOT, environment, start_two

from faults import bucket
from faults.asking import page
from faults.trials import (
    STEPS,
    Campaign,
    Trial,
    finish,
    judged,
    start,
    started,
    wait_until,
)


def _is_saving(workdir: Path) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


def _steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kills(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Kill one process with SIGKILL, three times of five inside a save; then run to the end."""
    yield from _kills(campaign, count, seed, processes=1)


def kills_of_two(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Kill both processes of a run, three times of five inside a save; then run to the end."""
    yield from _kills(campaign, count, seed, processes=2)


def _kills(campaign: Campaign, count: int, seed: int, *, processes: int) -> Iterator[Trial]:
    rng = random.Random(seed)
    losses = campaign.losses
    if processes > 1:  # float32 sums in another order than one process has
        whole = campaign.folder / f"whole-{processes}"
        for process in _start(campaign, whole, processes):
            _end(process)
        losses = run_losses(whole)
    for group in range(0, count, 5):
        workdir = campaign.folder / f"kills-{processes}-{group}"
        faults = [
            _kill(_start(campaign, workdir, processes), workdir, rng, in_save=number % 5 < 3)
            for number in range(group, min(group + 5, count))
        ]
        run = _start(campaign, workdir, processes)
        ends = [_end(process) for process in run]
        text = "".join(p.read_text() for p in campaign.folder.glob(f"{workdir.name}*.log"))
        code = next((code for code in ends if code != 0), 0)
        for fault in faults:
            yield judged(campaign, workdir, code, text, fault, losses)


def _kill(run: list[subprocess.Popen], workdir: Path, rng: random.Random, *, in_save: bool) -> str:
    """Kill a run inside a save or where it happens to be; return where that was."""
    before = _steps_done(workdir)
    # From the first step on: before it, what an earlier kill has left of a save may lie there.
    wait_until(lambda: _steps_done(workdir) > before, run[0])
    if in_save:
        wait_until(lambda: _is_saving(workdir), run[0])
    else:
        time.sleep(rng.uniform(0, 0.15))
        wait_until(lambda: not _is_saving(workdir), run[0])
    is_over = any(process.poll() is not None for process in run)
    for process in run:
        process.kill()
    for process in run:
        process.wait()
    if is_over:
        return "over before it was killed"
    # What stays of a save that was not finished.
    return f"killed {'inside' if _is_saving(workdir) else 'outside'} a save"


def _end(process: subprocess.Popen) -> int | None:
    try:
        return process.wait(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        return None


def _start(campaign: Campaign, workdir: Path, processes: int) -> list[subprocess.Popen]:
    if processes == 1:
        return [start(campaign.experiment, workdir)]
    flags = (f"--config.train.steps={STEPS}", "--config.checkpoint.every=3")
    return [started(p) for p in start_two(campaign.experiment, workdir, *flags, devices=1)]


def damages(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Damage a file of the newest checkpoint: bits, zeros, cut, emptied, deleted."""
    yield from _in_one_process(campaign, "damage", count, seed)


def damages_of_meta(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Flip bits of the newest checkpoint's `meta`."""
    yield from _in_one_process(campaign, "meta", count, seed)


def mutants(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Read checkpoints of other programs with bytes changed."""
    yield from _in_one_process(campaign, "mutants", count, seed)


def configs(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Resolve experiments, and read configs of models, with random values in them."""
    yield from _in_one_process(campaign, "configs", count, seed)


def _in_one_process(campaign: Campaign, what: str, count: int, seed: int) -> Iterator[Trial]:
    """Make trials of a second each in one process, which the start of Python would outweigh."""
    line = [sys.executable, "-m", "faults.inside", what, str(count), str(seed)]
    line += [str(campaign.experiment), str(campaign.whole)]
    env = environment(1) | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    log, found = campaign.folder / f"{what}.log", 0
    with log.open("w") as errors:
        process = started(
            subprocess.Popen(
                line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        )
        assert process.stdout is not None
        for answer in process.stdout:
            found += 1
            yield Trial(*json.loads(answer))
    process.wait()
    reason = (log.read_text().strip().splitlines() or ["no reason"])[-1][:200]
    for _ in range(count - found):
        yield Trial(False, f"the process ended with {process.returncode}: {reason}")


def races(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Start the same command twice in one folder at once."""
    rng = random.Random(seed)
    for number in range(count):
        workdir = campaign.folder / f"race-{number}"
        first = start(campaign.experiment, workdir)
        time.sleep(rng.choice([0, 0, 1, 3]))
        second = start(campaign.experiment, workdir)
        (a, text), (b, _) = finish(first), finish(second)
        codes = sorted((a if a is not None else -1, b if b is not None else -1))
        refused = text.count("is in use by process")
        if codes == [0, 2] and refused == 1:
            yield judged(campaign, workdir, 0, text, "one ran, one was refused")
        elif codes == [0, 0]:  # the first was done before the second looked
            yield judged(campaign, workdir, 0, text, "one after the other")
        else:
            yield Trial(False, f"exit codes {codes}")


def full_disks(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Run where no file may grow beyond a size; then without that limit."""
    rng = random.Random(seed)
    for number in range(count):
        workdir, limit = campaign.folder / f"full-{number}", int(10 ** rng.uniform(2, 6.3))
        workdir.mkdir()
        log = workdir.with_name(f"{workdir.name}.first.log")
        line = [sys.executable, "-m", "clip_jax.main", "--config", str(campaign.experiment)]
        line += ["--workdir", str(workdir), f"--config.train.steps={STEPS}"]
        line += ["--config.checkpoint.every=3", "--config.train.compile_cache="]
        with log.open("w") as out:
            process = subprocess.Popen(
                line,
                cwd=ROOT,
                env=environment(1) | {"JAX_COMPILATION_CACHE_DIR": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=lambda limit=limit: resource.setrlimit(
                    resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)
                ),
            )
            started(process)
            try:
                text, _ = process.communicate(timeout=240)
            except subprocess.TimeoutExpired:
                process.kill()
                yield Trial(False, f"files of {limit} bytes at most: hung")
                continue
            out.write(text)
        if process.returncode not in (0, 1, 2) or "Traceback" in text:
            last = text.strip().splitlines()[-1][:200] if text.strip() else ""
            yield Trial(False, f"{limit} bytes: {process.returncode}: {last}")
            continue
        code, text = finish(start(campaign.experiment, workdir))
        lost = _lines_lost(campaign, workdir)
        fault = f"files of {limit} bytes at most, exit code {process.returncode}"
        if code == 0 and lost:
            yield Trial("Traceback" not in text, f"{fault}; {lost} lines of metrics lost")
        else:
            yield judged(campaign, workdir, code, text, fault)


def _lines_lost(campaign: Campaign, workdir: Path) -> int:
    """Return how many of a run's lines are not there; all that are must be right."""
    found = dict(run_losses(workdir))
    right = dict(campaign.losses)
    if any(right[step] != loss for step, loss in found.items()):
        return 0
    return len(right) - len(found)


def damaged_shards(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Damage a shard while the run reads it: the run ends well or with one line."""
    rng = random.Random(seed)
    for number in range(count):
        folder = campaign.folder / f"shards-{number}"
        shutil.copytree(campaign.experiment.parent, folder)
        experiment = folder / "experiment.py"
        experiment.write_text(
            experiment.read_text().replace(str(campaign.experiment.parent), str(folder))
        )
        workdir = folder / "run"
        process = start(experiment, workdir, "--config.data.max_skip_fraction=1.0")
        steps = rng.randint(0, STEPS - 4)
        wait_until(lambda workdir=workdir, steps=steps: _steps_done(workdir) >= steps, process)
        shard = rng.choice(sorted(folder.glob("*.tar")))
        what = _damage(shard, rng)
        code, text = finish(process)
        lines = text.strip().splitlines()
        ends_well = code == 0 or (code in (1, 2) and lines[-1].startswith("error: "))
        survived = ends_well and "Traceback" not in text
        yield Trial(survived, f"{what}: exit code {code}")
        shutil.rmtree(folder)


def _damage(path: Path, rng: random.Random) -> str:
    """Damage a file; return how."""
    data = bytearray(path.read_bytes())
    what = rng.choice(["bit", "zeros", "cut", "empty", "gone"])
    if what == "gone" or not data:
        path.unlink()
        return "gone"
    at = rng.randrange(len(data))
    if what == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif what == "zeros":
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif what == "cut":
        del data[at:]
    else:
        data.clear()
    path.write_bytes(data)
    return what


def server_faults(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Serve the shards by HTTP with errors: the run has the losses of local files."""
    rng = random.Random(seed)
    folder = campaign.experiment.parent
    for number in range(count):
        kind, share = rng.choice([500, 502, 503, 429, -1]), rng.uniform(0.1, 0.5)
        handler = _failing_handler(folder, kind, share, random.Random(seed + number))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
            thread = threading.Thread(target=http.serve_forever)
            thread.start()
            address = f"http://127.0.0.1:{http.server_port}/{{00000..00002}}.tar"
            workdir = campaign.folder / f"server-{number}"
            try:
                process = start(campaign.experiment, workdir, f"--config.data.train={address}")
                code, text = finish(process)
            finally:
                http.shutdown()
                thread.join()
        name = "broken bodies" if kind < 0 else str(kind)
        yield judged(campaign, workdir, code, text, f"{share:.0%} of answers {name}")


def _failing_handler(folder: Path, kind: int, share: float, rng: random.Random) -> type:
    failed_in_a_row: dict[str, int] = {}

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            row = failed_in_a_row.get(self.path, 0)
            if self.path.endswith(".json") or rng.random() > share or row >= 3:
                failed_in_a_row[self.path] = 0
                super().do_GET()
                return
            failed_in_a_row[self.path] = row + 1
            self.send_response(200 if kind < 0 else kind)
            self.send_header("Content-Length", "10240" if kind < 0 else "0")
            self.end_headers()
            if kind < 0:
                self.wfile.write(b"half")

        def log_message(self, *args):
            pass

    return Handler


KINDS = {
    "kills": (kills, 50, "one process killed"),
    "kills_of_two": (kills_of_two, 20, "both of two processes killed"),
    "damages": (damages, 500, "a file of a checkpoint damaged"),
    "meta": (damages_of_meta, 200, "a bit of `meta` flipped"),
    "races": (races, 10, "two runs in one folder"),
    "disks": (full_disks, 30, "no room for what a run writes"),
    "shards": (damaged_shards, 100, "a shard damaged in mid-run"),
    "server": (server_faults, 40, "a server that fails"),
    "bucket_kills": (bucket.kills, 10, "a run in a bucket killed"),
    "bucket_kills_gcs": (bucket.kills_of_gcs, 5, "a run in an emulated bucket of Google's killed"),
    "bucket": (bucket.faults, 10, "a bucket that fails"),
    "mutants": (mutants, 20_000, "checkpoints of others with bytes changed"),
    "configs": (configs, 2_000, "configs with random values"),
    "page": (page, 500, "hostile requests to the search page"),
}
"""By name: the trials, how many a whole campaign has, and what they are."""
