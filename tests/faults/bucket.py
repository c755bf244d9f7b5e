"""Runs whose work folder is in a bucket: killed, and with a server that fails."""

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pairs import run_losses
from run_tiny import ROOT, environment

from clip_jax.training.bucket import Bucket, read_manifest
from clip_jax.training.bucket_workdir import fetch
from faults.stores import BUCKET, GCS, S3, Proxy, Store, server_of
from faults.trials import EVERY, LONGEST, STEPS, Campaign, Trial, started, wait_until

OUTAGE = 60.0
"""Seconds that the longest outages last."""


class BucketRun:
    """A run in the bucket, from its machines to what it leaves there."""

    def __init__(self, campaign: Campaign, store: Store, name: str) -> None:
        self.campaign, self.url = campaign, f"{store.protocol}://{BUCKET}/{name}"
        name = f"{store.protocol}-{name}"
        self.folder = campaign.folder / name
        self.log = campaign.folder / f"{name}.log"
        self.machine = 0

    @property
    def scratch(self) -> Path:
        return self.folder / f"machine-{self.machine}"

    def start(self) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "clip_jax.main", "--config", str(self.campaign.experiment)]
        line += ["--workdir", self.url, "--scratch", str(self.scratch)]
        line += [f"--config.train.steps={STEPS}", f"--config.checkpoint.every={EVERY}"]
        with self.log.open("a+") as out:
            return started(
                subprocess.Popen(
                    line, cwd=ROOT, env=environment(1), stdout=out, stderr=out, text=True
                )
            )

    def move(self) -> None:
        """Go on on another machine, which has nothing of the run."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.machine += 1

    def steps_done(self) -> int:
        found = list(self.scratch.glob("*/*/metrics.jsonl"))
        return found[0].read_text().count("\n") if found else 0

    def judged(self, code: int | None, fault: str) -> Trial:
        """Return the trial of a run that was to leave the undisturbed run's numbers there."""
        text = self.log.read_text()
        last = text.strip().splitlines()[-1][:200] if text.strip() else ""
        if code is None:
            return Trial(False, f"{fault}: hung")
        if "Traceback" in text or code:
            return Trial(False, f"{fault}: exit code {code}: {last}")
        copy, bucket = self.folder / "copy", Bucket(self.url)
        if not copy.exists():
            fetch(bucket, copy, read_manifest(bucket))
        if run_losses(copy) != self.campaign.losses:
            return Trial(False, f"{fault}: other losses")
        if _digests(copy) != _digests(self.campaign.whole):
            return Trial(False, f"{fault}: other weights")
        return Trial(True, fault)


def _digests(workdir: Path) -> dict[str, int]:
    """Return the digests of the arrays of the last state."""
    meta = workdir / "checkpoints" / str(STEPS) / "meta" / "metadata"
    return json.loads(meta.read_text())["digests"]


def _end(process: subprocess.Popen[str]) -> int | None:
    try:
        return process.wait(timeout=LONGEST + OUTAGE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def kills(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Kill a run, three times of five in an upload; every other time another machine goes on."""
    yield from _kills(campaign, count, seed, S3)


def kills_of_gcs(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Kill a run in an emulated bucket of Google's."""
    yield from _kills(campaign, count, seed, GCS)


def _kills(campaign: Campaign, count: int, seed: int, store: Store) -> Iterator[Trial]:
    if store.is_missing():
        return
    rng = random.Random(seed)
    with server_of(store, seed) as proxy:
        proxy.mode = "slow"  # uploads take long enough to be killed inside one
        proxy.share = 0.1
        for group in range(0, count, 5):
            run, faults = BucketRun(campaign, store, f"kills-{seed}-{group}"), []
            for number in range(group, min(group + 5, count)):
                faults.append(_kill(run, proxy, rng, in_upload=number % 5 < 3))
                if number % 2:
                    run.move()
                    faults[-1] += ", went on on another machine"
            run.move()
            code = _end(run.start())
            for fault in faults:
                yield run.judged(code, fault)


def _kill(run: BucketRun, proxy: Proxy, rng: random.Random, *, in_upload: bool) -> str:
    process, before = run.start(), run.steps_done()
    wait_until(lambda: run.steps_done() > before, process)
    if in_upload:
        proxy.uploading = False
        wait_until(lambda: proxy.uploading, process)
    time.sleep(rng.uniform(0, 0.1))
    is_inside, is_over = proxy.uploading, process.poll() is not None
    process.kill()
    process.wait()
    if is_over:
        return "over before it was killed"
    return f"killed {'inside' if is_inside else 'outside'} an upload"


def faults(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Let the server fail while a run trains, for up to a minute."""
    if S3.is_missing():
        return
    rng = random.Random(seed)
    with server_of(S3, seed) as proxy:
        for number in range(count):
            run = BucketRun(campaign, S3, f"faults-{seed}-{number}")
            mode = ("down", "error", "slow", "lost")[number % 4]
            seconds = OUTAGE if number < 4 else rng.uniform(5, 30)
            proxy.mode, proxy.share, proxy.faults = "ok", 1.0, 0
            process = run.start()
            steps = rng.randint(1, STEPS // 2)
            wait_until(lambda run=run, steps=steps: run.steps_done() >= steps, process)
            if mode != "down" and number >= 4:
                proxy.share = rng.uniform(0.2, 0.6)
            proxy.mode = mode
            recovery = threading.Timer(seconds, setattr, (proxy, "mode", "ok"))
            recovery.start()
            code = _end(process)
            recovery.cancel()
            proxy.mode = "ok"
            names = {"down": "no server", "error": "answers 500", "slow": "a slow server"}
            name = names.get(mode, "answers that are lost")
            shown = f"{name} for {seconds:.0f} s" if proxy.faults else f"{name}, never met"
            yield run.judged(code, shown)
