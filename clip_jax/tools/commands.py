"""List the commands, each with a line on what it does: `python -m clip_jax`.

Nothing is imported for it: the lines are read from the files.
"""

import ast
import textwrap
from collections.abc import Sequence

from clip_jax import distribution, experiments
from clip_jax.errors import UserError

COMMANDS = {
    "main": "main.py",
    "evaluate": "tools/evaluate.py",
    "benchmark": "tools/benchmark.py",
    "wiseft": "tools/wiseft.py",
    "report": "tools/report.py",
    "replay": "tools/replay.py",
    "plan": "tools/plan.py",
    "convert": "tools/convert.py",
    "export": "tools/export.py",
    "embed": "tools/embed.py",
    "search": "tools/search.py",
    "relevance": "tools/relevance.py",
    "data.inspect": "tools/data_inspect.py",
    "data.shard": "tools/data_shard.py",
    "data.filter": "tools/data_filter.py",
    "data.reinforce": "tools/data_reinforce.py",
    "data.bench": "tools/data_bench.py",
    "data.emoji": "tools/data_emoji.py",
    "tokenizers.train": "tokenizers/train.py",
    "doctor": "tools/doctor.py",
}
"""`python -m clip_jax.NAME`, and the file it is written in."""


def summary(name: str) -> str:
    """Return what a command does: its docstring's first words, up to the colon."""
    doc = ast.get_docstring(
        ast.parse((distribution.PACKAGE / COMMANDS[name]).read_text(encoding="utf-8"))
    )
    return (doc or "").partition(": `python")[0]


def listing() -> str:
    """Return the commands, the experiments and where the launch scripts lie."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary(name)}" for name in COMMANDS]
    known = textwrap.fill(", ".join(experiments.names()), 78, initial_indent="  ")
    return "\n".join(
        [
            f"clip_jax {distribution.version()}, commands of `python -m clip_jax.NAME` "
            "(--help shows their flags):",
            *lines,
            "experiments, for --config NAME of main and plan:",
            known.replace("\n", "\n  "),
            f"launch files for SLURM, Kubernetes, SkyPilot and TPU pods: {experiments.LAUNCH}",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Print the commands; return the process's exit code.

    Raises:
      UserError: there is an argument, which belongs to one of the commands.
    """
    if argv and argv[0] not in ("-h", "--help"):
        name = argv[0] if argv[0] in COMMANDS else "NAME"
        raise UserError(f"unexpected argument {argv[0]!r}; commands are python -m clip_jax.{name}")
    print(listing())
    return 0
