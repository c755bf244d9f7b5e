"""Read where the members of a zip archive lie in its file, more strictly than `zipfile` does.

Checkpoints are archives whose members lie in the file as they are, so that arrays can be views of
it. `zipfile` reads the directory. What it lets pass is refused here: bytes before or behind the
archive, another number of members than the end record counts, a name that stands twice, members
that overlap or lie outside of the file, a member whose own header says something else than the
directory, and a directory that would fill the memory.
"""

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_jax.pretrained.mapped_file import BadFileError, shown

# A model with its optimizer has a few thousand members, of about a hundred bytes here.
_MAX_DIRECTORY = 4 << 20
_END = struct.Struct("<4s4H2IH")
_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED, _UTF8 = 1, 0x800
_FULL16 = 0xFFFF


class Member(NamedTuple):
    """One member: its bytes are `file[start:stop]`, `size` bytes once inflated."""

    name: str
    method: int
    crc: int
    size: int
    header: int
    start: int
    stop: int


class _LimitedReads(io.FileIO):
    """A file for `zipfile`, which reads a whole directory at once, however long it says it is."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise BadFileError(
                f"has a zip directory of {size} bytes, more than any checkpoint needs"
            )
        return super().read(size) or b""


def zip_members(path: str | Path, file_U: np.ndarray) -> dict[str, Member]:
    """Return every member of an archive by name.

    Args:
      path: the archive.
      file_U: its bytes.

    Raises:
      BadFileError: it is no sound zip archive.
    """
    end = file_U[-_END.size :].tobytes()
    if len(end) < _END.size or end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise BadFileError("has no zip directory at its end")
    count = _END.unpack(end)[4]
    try:
        with _LimitedReads(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    # A size or a place that is damaged leads zipfile to an impossible seek.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError) as error:
        raise BadFileError(f"its zip directory cannot be read ({shown(error)})") from None
    if count not in (len(entries), _FULL16):  # full where a 64-bit record counts them
        raise BadFileError(f"has {len(entries)} members in its zip directory and counts {count}")
    members: dict[str, Member] = {}
    for entry in entries:
        member = _member(file_U, entry)
        if member.name in members:
            raise BadFileError(f"holds the member {shown(member.name)} twice")
        members[member.name] = member
    _check_places(members)
    return members


def member_bytes(file_U: np.ndarray, member: Member) -> np.ndarray:
    """Return a stored member's bytes as a view, its checksum compared.

    A checksum of 0 means that the writer left it out (`torch.serialization.set_crc32_options`).

    Raises:
      BadFileError: the member is compressed, or its bytes are damaged.
    """
    data_U = file_U[member.start : member.stop]
    if member.method != zipfile.ZIP_STORED:
        raise BadFileError(
            f"the member {shown(member.name)} is compressed", "unpack it and zip it uncompressed"
        )
    if member.size != len(data_U):
        raise BadFileError(f"the member {shown(member.name)} is given two sizes")
    check_crc(member, data_U.data)
    return data_U


def check_crc(member: Member, data: memoryview | bytes) -> None:
    """Raise BadFileError if the bytes of a member do not have the CRC-32 that its archive holds."""
    if member.crc and zlib.crc32(data) != member.crc:
        raise BadFileError(f"the bytes of {shown(member.name)} do not match their checksum")


def _member(file_U: np.ndarray, entry: zipfile.ZipInfo) -> Member:
    """Return the place of a member's bytes: behind its own header, which must repeat its name."""
    name, header = entry.orig_filename, entry.header_offset
    if entry.flag_bits & _ENCRYPTED:
        raise BadFileError(f"the member {shown(name)} is encrypted", "decrypt the archive first")
    if not 0 <= header <= len(file_U) - _LOCAL.size:
        raise BadFileError(f"the member {shown(name)} lies outside of the file")
    fields = _LOCAL.unpack(file_U[header : header + _LOCAL.size].tobytes())
    name_at = header + _LOCAL.size
    start = name_at + fields[9] + fields[10]
    raw_name = name.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
    own_name = file_U[name_at : name_at + fields[9]].tobytes()
    if (fields[0], fields[3], own_name) != (b"PK\3\4", entry.compress_type, raw_name):
        raise BadFileError(f"the header of the member {shown(name)} is not what the directory says")
    stop = start + entry.compress_size
    if stop > len(file_U):
        raise BadFileError(f"the member {shown(name)} declares more bytes than the file holds")
    return Member(name, entry.compress_type, entry.CRC, entry.file_size, header, start, stop)


def _check_places(members: dict[str, Member]) -> None:
    """Raise BadFileError unless the members begin with the file and follow each other.

    Members that share bytes are how a small archive pretends to be a large one.
    """
    places = sorted((member.header, member.stop, member.name) for member in members.values())
    if places and places[0][0] != 0:
        raise BadFileError("has other bytes before its first member")
    end = 0
    for header, stop, name in places:
        if header < end:
            raise BadFileError(f"the member {shown(name)} overlaps the one before it")
        end = stop
