"""This tree's step and encoders against another commit's, on CPUs, in turns.

    python -m benchmarks.against_commit 2a3a9d7 --model RN50 --pairs 16
    python -m benchmarks.against_commit 2a3a9d7 --pairs 64 --microbatch 8

The other commit is checked out into a temporary worktree, and both run with the packages that are
installed here, each in a process of its own. Losses and features that differ are told.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.interleaved import make_parser, ratio, report, spread, time_interleaved

ROOT = Path(__file__).resolve().parents[1]
CALLS = ("step", "encode_image", "encode_text")


def main(argv: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = make_parser(__doc__, warmup=1, repeats=10)
    parser.add_argument("commit", help="what git knows it by")
    parser.add_argument("--model", default="ViT-B/32", help="a name of the zoo")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--microbatch", type=int, default=0, help="pairs of GradCache's; 0: none")
    parser.add_argument("--length", type=int, default=24, help="text positions of the step")
    options = parser.parse_args(argv)
    with ExitStack() as stack:
        other = stack.enter_context(worktree(options.commit))
        old, new = (stack.enter_context(started(tree, options)) for tree in (other, ROOT))
        (ask_old, old_facts), (ask_new, new_facts) = old, new
        print(f"losses {old_facts['losses']} and {new_facts['losses']}")
        for name in ("losses", "encode_image", "encode_text"):
            print(f"{name}: {'equal' if old_facts[name] == new_facts[name] else 'NOT equal'}")
        times = time_interleaved(
            {
                (tree, name): partial(ask, name)
                for name in CALLS
                for tree, ask in (("old", ask_old), ("new", ask_new))
            },
            warmup=options.warmup,
            repeats=options.repeats,
        )
    rows = [
        {
            "call": name,
            "old, s": spread(times["old", name]),
            "new, s": spread(times["new", name]),
            "new / old": ratio(times["new", name], times["old", name]),
        }
        for name in CALLS
    ]
    report("against_commit", options, rows)


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check a commit out into a folder that goes away again.

    Raises:
      SystemExit: there is no such commit.
    """
    with tempfile.TemporaryDirectory(prefix="clip_jax_commit_") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run(
            [*git, "add", "--detach", str(tree), commit], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"error: {commit!r} cannot be checked out: {done.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


@contextmanager
def started(
    tree: Path, options: argparse.Namespace
) -> Iterator[tuple[Callable[[str], float], dict[str, Any]]]:
    """Start `benchmarks/timed_calls.py` on a tree; give what asks it for a call, and its facts.

    Raises:
      SystemExit: it has ended.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / "timed_calls.py")]
    for name in ("model", "pairs", "microbatch", "length"):
        command += [f"--{name}", str(getattr(options, name))]
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def read() -> Any:
        line = answers.readline()
        if not line:
            raise SystemExit(f"the process of {tree} has ended; see above")
        return json.loads(line)

    def ask(name: str) -> float:
        print(name, file=requests, flush=True)
        return read()

    try:
        facts = read()
        if not Path(facts["tree"]).is_relative_to(tree):
            raise SystemExit(f"{tree} was to be measured, and {facts['tree']} was imported")
        yield ask, facts
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
