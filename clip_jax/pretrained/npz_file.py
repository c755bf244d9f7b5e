"""Read NumPy's archives, which is how big_vision keeps its checkpoints.

Arrays that the archive holds as they are become read-only views of the file, where `np.load` would
copy them; compressed ones are inflated, never beyond the size that was checked first.
"""

import math
import re
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from clip_jax.pretrained.mapped_file import BadFileError, map_file, reading, shown
from clip_jax.pretrained.zip_file import Member, check_crc, member_bytes, zip_members

# Weights shrink by a tenth; a file that unfolds to more than this is no checkpoint.
_MAX_INFLATION = 8
_SMALL = 1 << 20
_MAX_RANK = 32
_MAX_HEADER = 4096
# The one form that NumPy writes for plain arrays. Its own reader of headers evaluates them as
# Python literals, which ends in any of eight exceptions or in a warning where a header is damaged.
_HEADER = re.compile(
    r"\{'descr': '([<|=]?[a-zA-Z][0-9]{1,2})', 'fortran_order': (True|False),"
    r" 'shape': \(((?:[0-9]{1,15}(?:, ?|(?=\))))*)\), \} *\n"
)
_DTYPES = {
    **{f"<{kind}{size}": np.dtype(f"<{kind}{size}") for kind in "iuf" for size in (2, 4, 8)},
    **{f"|{kind}1": np.dtype(f"{kind}1") for kind in "iu"},
    "|b1": np.dtype(np.bool),
    # NumPy has no name for bfloat16 and writes it as two bytes without a meaning.
    **{f"{order}V2": np.dtype(ml_dtypes.bfloat16) for order in "<|"},
}


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz` archive by name (`params/img/embedding/kernel`).

    Two-byte void items are taken for bfloat16, which is how NumPy stores those.

    Raises:
      UserError: the file is cut or damaged, or holds Python objects or other than plain arrays.
    """
    with reading(path):
        file_U = map_file(path)
        if file_U[:2].tobytes() != b"PK":
            raise BadFileError("is not a .npz archive", "give a file that numpy.savez wrote")
        members = zip_members(path, file_U)
        total = sum(member.size for member in members.values())
        if total > _MAX_INFLATION * len(file_U) + _SMALL:
            raise BadFileError(
                f"has {len(file_U)} bytes and declares {total}", "save it with numpy.savez"
            )
        for name in members:
            if not name.endswith(".npy"):
                raise BadFileError(
                    f"holds {shown(name)}, which is no array", "give a file that numpy.savez wrote"
                )
        return {
            name.removesuffix(".npy"): _array(name, _inflate(file_U, member))
            for name, member in members.items()
        }


def _inflate(file_U: np.ndarray, member: Member) -> np.ndarray:
    """Return a member's bytes, which must be exactly as many as it declares."""
    if member.method != zipfile.ZIP_DEFLATED:
        return member_bytes(file_U, member)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    packed = file_U[member.start : member.stop].data
    try:
        # One byte more would come out of a member that lies about its size.
        data = inflater.decompress(packed, member.size + 1)
    except zlib.error as error:
        raise BadFileError(
            f"the member {shown(member.name)} cannot be inflated ({error})"
        ) from None
    if len(data) != member.size:
        raise BadFileError(
            f"the member {shown(member.name)} does not inflate to its {member.size} bytes"
        )
    check_crc(member, data)
    return np.frombuffer(data, np.uint8)


def _array(name: str, data_U: np.ndarray) -> np.ndarray:
    """Return the array of one `.npy` member: a short text header, and numbers to its end."""
    magic, version = data_U[:6].tobytes(), data_U[6:8].tobytes()
    length_bytes = {b"\1\0": 2, b"\2\0": 4}.get(version, 0)
    start = 8 + length_bytes
    length = int.from_bytes(data_U[8:start].tobytes(), "little")
    if magic != b"\x93NUMPY" or not length_bytes or len(data_U) < start + min(length, _MAX_HEADER):
        raise BadFileError(f"the member {shown(name)} is not a plain array of numpy.save")
    text = data_U[start : start + min(length, _MAX_HEADER)].tobytes().decode("latin-1")
    header = _HEADER.fullmatch(text)
    if not header or header[1] not in _DTYPES:
        raise BadFileError(
            f"the array {shown(name)} has the header {shown(text.strip())}",
            "only plain little-endian numbers are read: save it as float32 with numpy.savez",
        )
    dtype = _DTYPES[header[1]]
    shape = [int(size) for size in header[3].replace(",", " ").split()]
    body_U = data_U[start + length :]
    if (
        len(shape) > _MAX_RANK
        or math.prod(shape) * dtype.itemsize != len(body_U)
        or math.prod(max(size, 1) for size in shape) >= 1 << 48
    ):
        raise BadFileError(
            f"the array {shown(name)} of shape {shown(tuple(shape))} and type {header[1]}"
            f" is given {len(body_U)} bytes"
        )
    order = "F" if header[2] == "True" else "C"
    return body_U.view(dtype).reshape(shape, order=order)  # type: ignore[call-overload]
