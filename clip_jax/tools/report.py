"""Show runs on one page: `python -m clip_jax.report WORKDIR [WORKDIR2 ...]`.

A folder is a run's, or the `--out` of `python -m clip_jax.evaluate`. The page is one HTML file that
asks nothing of the network.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from clip_jax.data.formats.remote import is_url
from clip_jax.errors import run_command
from clip_jax.files import check_local


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.report", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="WORKDIR", help="runs to show side by side")
    parser.add_argument(
        "--out",
        help="the page; report.html in the first folder, report-NAME.html where that is a URL",
    )
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class ReportPage:
    """A page that was written: its path, and its size in bytes."""

    path: Path
    size: int


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> ReportPage:
    """Write the page of these folders.

    Raises:
      UserError: a folder has nothing to report, or holds a damaged file.
    """
    from clip_jax.report_page.page import write_report
    from clip_jax.training.bucket_copy import local_copy
    from clip_jax.training.bucket_workdir import place_name

    check_local({"--out": out})
    if is_url(str(folders[0])) and out is None:
        out = f"report-{place_name(str(folders[0]))}.html"
    folders = [local_copy(folder, weights=False) for folder in folders]
    path = write_report(folders, out)
    return ReportPage(path, path.stat().st_size)


def report_text(page: ReportPage) -> str:
    """Return the line to print."""
    return f"report: {page.path} ({page.size / 2**20:.1f} MiB)"


def main() -> int:
    """Parse the flags, write the page and print where it is; return the exit code."""
    args = parse(None)
    print(report_text(report(args.folders, args.out)))
    return 0


if __name__ == "__main__":
    run_command(main)
