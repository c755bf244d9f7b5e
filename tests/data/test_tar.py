"""The plain reader against Python's `tarfile`, on sound archives and on damaged ones."""

import io
import os
import tarfile

import data_cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.formats import tar
from clip_jax.errors import UserError

FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def archive(names, form, **fields):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[form]) as writer:
        for name, size in names:
            info = tarfile.TarInfo(name)
            info.size = size
            for field, value in fields.items():
                setattr(info, field, value)
            writer.addfile(info, io.BytesIO(bytes(range(256)) * (size // 256 + 1)))
    return out.getvalue()


def both(data):
    """Return the members by (the plain reader, tarfile), None where one declines."""
    with open(os.memfd_create("tar"), "w+b") as file:
        file.write(data)
        file.flush()
        try:
            plain = list(tar._plain_members(file.fileno(), len(data)))
        except tar._NotPlain:
            plain = None
        try:
            other = list(tar._tarfile_members("x.tar", file, len(data)))
        except UserError:
            other = None
    return plain, other


NAMES = st.lists(
    st.tuples(st.text("ab./é日", min_size=1, max_size=90), st.integers(0, 1500)), max_size=6
)


@settings(max_examples=80, deadline=None)
@given(NAMES, st.sampled_from(sorted(FORMATS)), st.sampled_from([0, 12, 1.5e9 + 0.25]))
def test_both_readers_find_the_same_members(names, form, mtime):
    names = [(name, size) for name, size in names if not name.startswith("/")]
    try:
        data = archive(names, form, mtime=mtime)
    except ValueError:  # ustar has no room for the name
        return
    plain, other = both(data)
    assert [m.size for m in other] == [size for _, size in names]
    assert plain is None or plain == other


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_on_damage_the_plain_reader_declines_or_agrees(form, data):
    raw = bytearray(archive([("a/b.jpg", 700), ("a/b.txt", 5), ("é.cls", 0)], form, mtime=1.5))
    end = len(raw.rstrip(b"\0"))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    plain, other = both(bytes(raw))
    assert plain is None or plain == other


@pytest.mark.parametrize("at", [124, 148])  # the fields of the size and of the checksum
def test_a_zero_byte_ends_a_number(at):
    raw = bytearray(archive([("a/b.jpg", 700), ("a/b.txt", 5)], "ustar"))
    raw[at] = 0
    assert both(bytes(raw)) == (None, None)


@pytest.mark.parametrize("form", ["pax", "ustar"])
def test_the_plain_reader_knows_what_shard_writers_write(form):
    names = [("x/000.jpg", 9), ("x/000.txt", 600), ("n" * 80 + "/" + "k" * 60 + ".json", 1)]
    plain, other = both(archive(names, form, mtime=1.5e9 if form == "ustar" else 1.5e9 + 0.25))
    assert plain == other and len(plain) == 3


def test_it_knows_webdatasets_writer(tmp_path):
    (path,) = data_cases.write_shards(tmp_path, [4])
    with open(path, "rb") as file:
        plain, other = both(file.read())
    assert plain == other and len(plain) == 16


def test_links_and_folders_are_no_files(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as writer:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/a.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            writer.addfile(info)
    with open(path, "rb") as file:
        found = tar.members(str(path), file, os.path.getsize(path))
    assert [(m.is_file, m.is_folder) for m in found] == [(False, True), (False, False)]
