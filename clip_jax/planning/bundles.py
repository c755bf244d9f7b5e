"""Cycles of Pallas kernels, from the schedules that a TPU's compiler writes.

The compiler estimates every instruction but kernels, gathers and scatters. It also schedules a
TPU's core: each bundle of instructions takes one cycle, unless it waits for memory. So a kernel's
cycles are its bundles, those in a loop as often as it runs.

libtpu writes a file for each instruction of a program, NUMBER-INSTRUCTION-NUMBER-final_bundles.txt
(`compilers.start_compiler` asks for them).
"""

import dataclasses
import itertools
import re
from pathlib import Path

_FILE = re.compile(r"^\d+-(.+)-\d+-final_bundles\.txt$")
# "   0x1 LB: > { %s1 = ... }": the address, what control flow does here, the depth in loops. An
# empty bundle, "   0x5   :  {}", names no depth and stands where the one before it does.
_BUNDLE = re.compile(
    r"^\s*(?:0x)?[0-9a-f]+\s+(?P<marks>[A-Z ]*):\s(?P<depth>(?:>\s?)*)\s*\{(?P<empty>\})?"
)
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")
# The loop over a kernel's grid runs twice more, to read the first block and write the last.
_PIPELINED = "/* iteration index, stage = "
_FILL_AND_DRAIN = 2
_SHORT = 0.1


def read_kernel_cycles(folder: str, names: frozenset[str]) -> dict[str, int]:
    """Return the cycles of the kernels of these instruction names whose schedules are there.

    A kernel with a loop whose trips are not written there is left out.
    """
    cycles = {}
    for path in sorted(Path(folder).glob("*-final_bundles.txt")):
        match = _FILE.match(path.name)
        if match and match.group(1) in names:
            count = scheduled_cycles(path.read_text())
            if count is not None:
                cycles[match.group(1)] = count
    return cycles


@dataclasses.dataclass
class _Loop:
    bundles: int = 0
    trips: int | None = None
    is_pipelined: bool = False

    def cycles(self, around: int) -> int | None:
        """Return all trips' bundles; None where the trips are not known and may be many.

        `around` are the bundles of the loop around it. Copies of what does not fill a register
        have short loops that end on the data, which run once or not at all.
        """
        if self.trips is None:
            return self.bundles if self.bundles < _SHORT * around else None
        trips = self.trips - _FILL_AND_DRAIN if self.is_pipelined else self.trips
        return self.bundles * max(trips, 1)


@dataclasses.dataclass
class _Bundle:
    depth: int
    is_start: bool
    line: str


def scheduled_cycles(text: str) -> int | None:
    """Return the cycles of a schedule, its loops run out; None where a loop's trips are unknown."""
    loops = [_Loop(trips=1)]
    for bundle in _read_bundles(text):
        depth = bundle.depth
        while len(loops) - 1 > depth or (bundle.is_start and len(loops) - 1 == depth > 0):
            if not _close(loops):
                return None
        while len(loops) - 1 < depth:
            loops.append(_Loop())
        loops[-1].bundles += 1
        loops[-1].is_pipelined |= _PIPELINED in bundle.line
        if test := _EXIT.search(bundle.line):
            loops[-1].trips = int(test.group(1))
    while len(loops) > 1:
        if not _close(loops):
            return None
    return loops[0].bundles


def _read_bundles(text: str) -> list[_Bundle]:
    bundles: list[_Bundle] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if not match:
            continue
        is_empty = match.group("empty") and bundles
        depth = bundles[-1].depth if is_empty else match.group("depth").count(">")
        is_start = "L" in match.group("marks").replace("LE", "")
        bundles.append(_Bundle(depth, is_start, line))
    # In a loop stand bundles that name the depth around it: of an instruction that was moved there.
    for before, after in itertools.pairwise(reversed(bundles)):
        if before.depth > after.depth and not before.is_start:
            after.depth = before.depth
    return bundles


def _close(loops: list[_Loop]) -> bool:
    """Add the innermost loop to the one around it; False where its trips are unknown."""
    cycles = loops.pop().cycles(loops[-1].bundles)
    loops[-1].bundles += cycles or 0
    return cycles is not None
