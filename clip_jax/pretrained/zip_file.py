"""The directory of a zip archive, read more strictly than `zipfile` does.

Checkpoints are archives whose members lie in the file as they are, so that arrays can be views of
it. Here a directory counts only if it ends where the end record begins, its members do not
overlap, and each name says the same in both of its places. Memory is bounded by the file's size.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

from clip_jax.pretrained.mapped_file import BadFile, shown

STORED, DEFLATED = 0, 8

# A model with its optimizer has a few thousand members.
_MAX_MEMBERS = 100_000
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FULL32 = 0xFFFFFFFF
_ENCRYPTED = 1


class Member(NamedTuple):
    """One member: its bytes are `file[start:stop]`, `size` bytes once inflated."""

    name: str
    method: int
    crc: int
    size: int
    header: int
    start: int
    stop: int


def zip_members(file_U: np.ndarray) -> dict[str, Member]:
    """Every member of the archive whose bytes are `file_U`, by name.

    Raises:
      BadFile: the bytes are no sound zip archive.
    """
    start, stop, count = _find_directory(file_U)
    if count > _MAX_MEMBERS:
        raise BadFile(f"declares {count} members, more than any checkpoint has")
    directory = file_U[start:stop].tobytes()
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        member, at = _read_member(file_U, directory, at, start)
        if member.name in members:
            raise BadFile(f"holds the member {shown(member.name)} twice")
        members[member.name] = member
    if at != len(directory):
        raise BadFile("the zip directory is longer than its members")
    _check_overlap(members)
    return members


def member_bytes(file_U: np.ndarray, member: Member) -> np.ndarray:
    """A stored member's bytes as a view, its checksum compared.

    A checksum of 0 means that the writer left it out (`torch.serialization.set_crc32_options`).
    """
    data_U = file_U[member.start : member.stop]
    if member.method != STORED:
        raise BadFile(
            f"the member {shown(member.name)} is compressed", "unpack it and zip it uncompressed"
        )
    if member.size != len(data_U):
        raise BadFile(f"the member {shown(member.name)} is given two sizes")
    check_crc(member, data_U.data)
    return data_U


def check_crc(member: Member, data: memoryview | bytes) -> None:
    """Compare the bytes of a member with the checksum its archive holds."""
    if member.crc and zlib.crc32(data) != member.crc:
        raise BadFile(f"the bytes of {shown(member.name)} do not match their checksum")


def _find_directory(file_U: np.ndarray) -> tuple[int, int, int]:
    """(start, stop, number of members) of the central directory."""
    size = len(file_U)
    tail = file_U[max(size - _END.size - 0xFFFF, 0) :].tobytes()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise BadFile("has no zip directory at its end")
    _, disk, disk_0, here, count, length, start, comment = _END.unpack_from(tail, at)
    stop = size - len(tail) + at
    if at + _END.size + comment != len(tail) or disk or disk_0 or here != count:
        raise BadFile("the record at the end of the zip archive is wrong")
    locator = stop - _LOCATOR64.size
    if locator >= 0 and file_U[locator : locator + 4].tobytes() == b"PK\6\7":
        start, length, stop, count = _read_end64(file_U, locator)
    if start + length != stop:
        raise BadFile("the zip directory is not where the end of the archive says")
    return start, stop, count


def _read_end64(file_U: np.ndarray, locator: int) -> tuple[int, int, int, int]:
    """(start, length, stop, number of members) of a directory, from the 64-bit end record."""
    _, _, at, _ = _LOCATOR64.unpack(file_U[locator : locator + _LOCATOR64.size].tobytes())
    if at + _END64.size > locator:
        raise BadFile("the 64-bit end record of the zip archive is not in the file")
    record = _END64.unpack(file_U[at : at + _END64.size].tobytes())
    signature, rest, _, _, disk, disk_0, here, count, length, start = record
    if signature != b"PK\6\6" or rest + 12 != locator - at or disk or disk_0 or here != count:
        raise BadFile("the 64-bit end record of the zip archive is wrong")
    return start, length, at, count


def _read_member(
    file_U: np.ndarray, directory: bytes, at: int, data_end: int
) -> tuple[Member, int]:
    """The member whose directory record is at `at`, and where the next record is."""
    if at + _CENTRAL.size > len(directory):
        raise BadFile("the zip directory ends inside a record")
    fields = _CENTRAL.unpack_from(directory, at)
    signature, flags, method, crc = fields[0], fields[3], fields[4], fields[7]
    packed, size, name_length, extra_length, comment_length = fields[8:13]
    header = fields[16]
    at += _CENTRAL.size
    next_at = at + name_length + extra_length + comment_length
    if signature != b"PK\1\2" or next_at > len(directory):
        raise BadFile("the zip directory is damaged")
    raw_name = directory[at : at + name_length]
    extra = directory[at + name_length : at + name_length + extra_length]
    size, packed, header = _widen([size, packed, header], extra)
    try:
        name = raw_name.decode()
    except UnicodeDecodeError:
        raise BadFile("a member's name is not UTF-8") from None
    if flags & _ENCRYPTED:
        raise BadFile(f"the member {shown(name)} is encrypted", "decrypt the archive first")
    start = _data_start(file_U, header, raw_name, method, data_end)
    if start + packed > data_end:
        raise BadFile(f"the member {shown(name)} declares more bytes than the file holds")
    return Member(name, method, crc, size, header, start, start + packed), next_at


def _widen(fields: list[int], extra: bytes) -> list[int]:
    """Replace the 32-bit fields that overflowed by those of the zip64 extra field, in order."""
    if _FULL32 not in fields:
        return fields
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1 and at + 4 + length <= len(extra):
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            if len(wide) < fields.count(_FULL32):
                break
            return [wide.pop(0) if field == _FULL32 else field for field in fields]
        at += 4 + length
    raise BadFile("a 64-bit size is missing from the zip directory")


def _data_start(
    file_U: np.ndarray, header: int, raw_name: bytes, method: int, data_end: int
) -> int:
    """Where a member's bytes begin: behind its own header, which must repeat its name."""
    if header + _LOCAL.size + len(raw_name) > data_end:
        raise BadFile(f"the member {shown(raw_name)} lies outside of the file")
    fields = _LOCAL.unpack(file_U[header : header + _LOCAL.size].tobytes())
    name_at = header + _LOCAL.size
    name = file_U[name_at : name_at + len(raw_name)].tobytes()
    if (fields[0], fields[3], fields[9], name) != (b"PK\3\4", method, len(raw_name), raw_name):
        raise BadFile(f"the header of the member {shown(raw_name)} is not what the directory says")
    return name_at + len(raw_name) + fields[10]


def _check_overlap(members: dict[str, Member]) -> None:
    """Members that share bytes are how a small archive pretends to be a large one."""
    end = 0
    for member in sorted(members.values(), key=lambda member: member.header):
        if member.header < end:
            raise BadFile(f"the member {shown(member.name)} overlaps the one before it")
        end = member.stop
