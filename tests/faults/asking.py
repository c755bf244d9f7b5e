"""Ask the search page what nobody should: `page`, a kind of fault."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from run_tiny import ROOT, environment

from faults.requests import CLOSED, Hostile, draw, request
from faults.trials import Campaign, Trial, started

ANSWER_SECONDS, LET_GO_SECONDS = 60.0, 90.0
"""Until a request without an answer counts as hung, and one that the client never ends."""
TRIES = 60
"""How often a request that is to be tried again is sent."""
MAX_BYTES = 700 << 20
"""By how much the server's memory may grow: four images of 20 MiB and one of 50 million pixels."""

Address = tuple[str, int]


def page(campaign: Campaign, count: int, seed: int) -> Iterator[Trial]:
    """Send hostile requests to one search page; it answers each, and good ones afterwards."""
    process, address = _serve(campaign)
    log = campaign.folder / "page.log"
    try:
        if address is None:
            yield Trial(False, f"the page did not start: {log.read_text()[-200:]}")
            return
        yield from _ask_all(address, process.pid, count, random.Random(seed))
        if "Traceback" in (lines := log.read_text()):
            yield Trial(False, f"a traceback: {lines[lines.index('Traceback') :][:3000]}")
        process.send_signal(signal.SIGINT)
        if process.wait(timeout=ANSWER_SECONDS) not in (0, 130):
            yield Trial(False, f"Ctrl-C: exit code {process.returncode}")
    finally:
        process.kill()
        process.wait()


def _serve(campaign: Campaign) -> tuple[subprocess.Popen[str], Address | None]:
    """Embed the pairs with the undisturbed run's model, and start the command of the page."""
    folder, env = campaign.folder / "embedded", environment(1)
    line = [sys.executable, "-m", "clip_jax.embed", "--model", str(campaign.whole)]
    line += ["--data", str(campaign.experiment.parent / "{00000..00002}.tar"), "--out", str(folder)]
    with (campaign.folder / "page.log").open("w") as out:
        subprocess.run(line, cwd=ROOT, env=env, stdout=out, stderr=out)
        line = [sys.executable, "-m", "clip_jax.search", str(folder), "--serve", "--port", "0"]
        process = started(
            subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=out, text=True)
        )
    assert process.stdout is not None
    for line_ in process.stdout:
        if match := re.match(r"http://(.+):(\d+) ", line_):
            return process, (match[1], int(match[2]))
    return process, None


def _ask_all(address: Address, pid: int, count: int, rng: random.Random) -> Iterator[Trial]:
    """Send the requests one after the other, but those that take a minute beside them."""
    before, asked = _resident(pid), 0
    slow: list[tuple[Hostile, Future[Trial]]] = []
    with ThreadPoolExecutor(32) as pool:
        while asked < count:
            hostile = draw(rng)
            clients = min(hostile.at_once, count - asked)
            asked += clients
            futures = [pool.submit(_trial, address, hostile) for _ in range(clients)]
            if hostile.stalls:
                slow += [(hostile, future) for future in futures]
                continue
            trials = [future.result() for future in futures]
            wrong = _wrong_now(address, pid, before)
            for trial in trials:
                is_wrong = trial.survived and wrong
                yield Trial(False, f"{hostile.name}: afterwards {wrong}") if is_wrong else trial
        yield from (future.result() for _, future in slow)


def _wrong_now(address: Address, pid: int, before: int) -> str:
    """Return what is wrong with a server that should answer a good request; empty is nothing."""
    try:
        answers = _answers(address, request("GET", "/search?words=red+bar&top=3"), ANSWER_SECONDS)
    except OSError as error:
        return f"a good request got {error}"
    if [status for status, _ in answers] != [200]:
        return f"a good request got {[status for status, _ in answers]}"
    if len(json.loads(answers[0][1])["hits"]) != 3:
        return "a good request got other hits"
    grown = _resident(pid) - before
    return f"the memory had grown by {grown >> 20} MiB" if grown > MAX_BYTES else ""


def _trial(address: Address, hostile: Hostile) -> Trial:
    """Send a request; alone it is sent again where the page asks for that, as it may for a while.

    Four uploads that have stalled are let go of after ten seconds.
    """
    for _ in range(TRIES):
        trial = _sent(address, hostile)
        if hostile.at_once > 1 or not trial.outcome.endswith(": 503"):
            break
        time.sleep(1)
    return trial


def _sent(address: Address, hostile: Hostile) -> Trial:
    begin = time.monotonic()
    longest = LET_GO_SECONDS if hostile.stalls else ANSWER_SECONDS
    try:
        answers = _answers(address, hostile.data, longest, is_cut=hostile.is_cut)
    except TimeoutError:
        return Trial(False, f"{hostile.name}: hung for {time.monotonic() - begin:.0f} s")
    except OSError as error:
        return Trial(False, f"{hostile.name}: {error}")
    statuses = [status for status, _ in answers] or [CLOSED]
    told = f"{hostile.name}: {statuses[0] or 'closed'}"
    is_right = statuses[0] in hostile.statuses and not any(s == 500 for s in statuses)
    for status, body in answers:
        if b"root:" in body or b"Traceback" in body or (status == 200 and not _is_whole(body)):
            is_right, told = False, f"{told}, with {body[:80]!r}"
    return Trial(is_right, told)


def _is_whole(body: bytes) -> bool:
    """Return whether what begins as JSON is JSON."""
    if not body.startswith(b"{"):
        return True
    try:
        json.loads(body, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return False
    return True


def _answers(
    address: Address, data: bytes, seconds: float, *, is_cut: bool = False
) -> list[tuple[int, bytes]]:
    """Send bytes; return (status, body) of what comes until the server closes the connection.

    Raises:
      TimeoutError: it did not in time.
    """
    end, received = time.monotonic() + seconds, bytearray()
    with socket.create_connection(address, timeout=seconds) as connection:
        try:
            connection.sendall(data)
            if is_cut:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                received += part
                connection.settimeout(max(0.01, end - time.monotonic()))
        except (ConnectionResetError, BrokenPipeError):
            pass  # closed while there was more to send
    parts = re.split(rb"(?:^|(?<=.))(?=HTTP/1\.1 \d{3} )", bytes(received), flags=re.S)
    heads = [part.partition(b"\r\n\r\n") for part in parts if part.startswith(b"HTTP/1.1 ")]
    found = [(int(head[9:12]), body) for head, _, body in heads]
    return [(status, body) for status, body in found if status >= 200]


def _resident(pid: int) -> int:
    """Return the most bytes that a process has had in memory."""
    text = Path(f"/proc/{pid}/status").read_text() if os.path.exists(f"/proc/{pid}") else ""
    match = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(match[1]) << 10 if match else 0
