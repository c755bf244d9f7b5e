"""The forms in which programs take the TPU's kernels, noted while they are traced."""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar

from clip_jax.models.packing import Packing


@dataclasses.dataclass(frozen=True)
class AttentionForm:
    """What the attention kernels are compiled for, however many programs there are.

    Attributes:
      heads, head_size: the number of heads, and the features of one.
      is_causal: a query sees the keys up to its own position.
      packing: of the sequences that one program takes.
    """

    heads: int
    head_size: int
    is_causal: bool
    packing: Packing


@dataclasses.dataclass(frozen=True)
class NormForm:
    """What the layer norm's kernels are compiled for, however many programs there are.

    Attributes:
      segments, rows, width: of what one program takes.
      epsilon: of the norm.
    """

    segments: int
    rows: int
    width: int
    epsilon: float


KernelForm = AttentionForm | NormForm

_noted: ContextVar[set[KernelForm] | None] = ContextVar("noted kernel forms", default=None)


@contextlib.contextmanager
def noted_forms() -> Iterator[set[KernelForm]]:
    """Collect the form of every kernel that this thread traces."""
    forms: set[KernelForm] = set()
    token = _noted.set(forms)
    try:
        yield forms
    finally:
        _noted.reset(token)


def note_form(form: KernelForm) -> None:
    """Note that a kernel is traced in this form, where somebody collects them."""
    forms = _noted.get()
    if forms is not None:
        forms.add(form)
