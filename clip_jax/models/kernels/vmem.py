"""The fast memory of a TPU's core (VMEM), and how much of a batch a program takes."""

VMEM_BYTES = {"v5e": 128 << 20, "v6e": 128 << 20, "v5p": 64 << 20, "v7": 64 << 20}
OTHER_VMEM_BYTES = 16 << 20
"""Of other generations."""
USABLE = 0.75
"""The share that a kernel takes at most; the rest stays the compiler's."""
ROWS_PER_PROGRAM = 256
MAX_SEGMENTS = 4


def vmem_limit(generation: str) -> int:
    """Return the most bytes of VMEM that a kernel may take on a generation of TPUs."""
    return int(USABLE * VMEM_BYTES.get(generation, OTHER_VMEM_BYTES))


def segments_per_program(segments: int, length: int) -> int:
    """Return how many segments of rows one program takes, a divisor of `segments`.

    Several where they are short: starting a program and its transfers costs a third of a
    microsecond.
    """
    taken = max(1, min(MAX_SEGMENTS, ROWS_PER_PROGRAM // length))
    while segments % taken:
        taken -= 1
    return taken


def attention_fits(length: int, width: int, generation: str) -> bool:
    """Return whether the backward kernel of attention fits, whole sequences at a time."""
    rows, lanes = -(-length // 16) * 16, -(-length // 128) * 128
    arrays = 2 * 7 * 2 * rows * width  # two copies of seven arrays, two bytes a number
    logits = 12 * 4 * rows * lanes
    return arrays + logits <= vmem_limit(generation)
