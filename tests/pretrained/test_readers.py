"""Checkpoint files of others: genuine ones read to the bit, hostile and damaged ones refused."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import reader_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_cases import GOLDEN, PLAIN, SCRIPT, STATE, WRAPPED, safetensors_bytes, same, write_torch

from clip_jax.errors import UserError
from clip_jax.pretrained import torch_pickle
from clip_jax.pretrained.mapped_file import BadFileError
from clip_jax.pretrained.npz_file import read_npz
from clip_jax.pretrained.resize import resize_image_positions, resize_text_positions
from clip_jax.pretrained.safetensors_file import read_safetensors
from clip_jax.pretrained.torch_file import read_torch
from clip_jax.pretrained.torch_pickle import _STEPS, load_pickle


def npz_bytes(arrays, save=np.savez):
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


# reader, the file's name, its bytes, what it holds
FILES = {
    "torch": (read_torch, "x.pt", (GOLDEN / "state_dict.pt").read_bytes(), STATE),
    "wrapper": (read_torch, "x.pt", (GOLDEN / "wrapper.pt").read_bytes(), WRAPPED),
    "torchscript": (read_torch, "x.pt", (GOLDEN / "torchscript.pt").read_bytes(), SCRIPT),
    "safetensors": (read_safetensors, "x.safetensors", safetensors_bytes(PLAIN), PLAIN),
    "npz": (read_npz, "x.npz", npz_bytes(PLAIN), PLAIN),
    "npz compressed": (read_npz, "x.npz", npz_bytes(PLAIN, np.savez_compressed), PLAIN),
}


def refused(reader, path):
    """Return the one line with which a reader refuses a file."""
    with pytest.raises(UserError) as caught:
        reader(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and ";" in line and len(line) < 700, line
    return line


def write_file(tmp_path, data, name="x.pt"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


# Sound files.


@pytest.mark.parametrize("name", FILES)
def test_reads_to_the_bit(tmp_path, name):
    reader, file_name, data, expected = FILES[name]
    arrays = reader(write_file(tmp_path, data, file_name))
    assert same(arrays, expected)
    assert list(arrays) == list(expected) or name == "torchscript"
    assert not any(array.flags.writeable and array.size for array in arrays.values())


@pytest.mark.parametrize("name", ["torch", "safetensors", "npz"])
def test_large_arrays_are_views_of_the_file(tmp_path, name):
    reader, file_name, *_ = FILES[name]
    big = {"big": np.arange(1 << 20, dtype=np.float32)}
    path = tmp_path / file_name
    if name == "torch":
        description = tensor_pickle(0, (1 << 20,), (1,), 1 << 20)
        write_torch(path, description.replace(b"\1\0\0\0w", b"\3\0\0\0big"), [("0", big["big"])])
    else:
        path.write_bytes(safetensors_bytes(big) if name == "safetensors" else npz_bytes(big))
    tracemalloc.start()
    arrays = reader(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert same(arrays, big)
    # A copy would take 4 MiB; zip's end is sought in a tail of 64 KiB.
    assert peak < 1 << 20


def test_a_file_without_tensors_at_its_top_names_its_dicts(tmp_path):
    program = b"\x80\x02}(\x8c\x05model}\x8c\x03ema}u."
    line = refused(read_torch, write_torch(tmp_path / "x.pt", program))
    assert "holds no tensors" in line and "model, ema" in line


def test_the_old_format_says_how_to_save_it_again():
    assert "torch.save(torch.load(path), new_path)" in refused(read_torch, GOLDEN / "legacy.pt")


def test_a_shared_storage_is_one_memory(tmp_path):
    arrays = read_torch(GOLDEN / "state_dict.pt")
    assert np.shares_memory(arrays["tied"], arrays["visual.conv1.weight"])


def sharded(tmp_path, **changes):
    first = {name: PLAIN[name] for name in list(PLAIN)[:3]}
    rest = {name: PLAIN[name] for name in list(PLAIN)[3:]}
    write_file(tmp_path, safetensors_bytes(first), "model-1.safetensors")
    write_file(tmp_path, safetensors_bytes(rest), "model-2.safetensors")
    shards = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(
        rest, "model-2.safetensors"
    )
    index = str({"weight_map": shards | changes}).replace("'", '"').encode()
    return write_file(tmp_path, index, "model.safetensors.index.json")


def test_a_sharded_index_is_read_as_one(tmp_path):
    path = sharded(tmp_path)
    assert same(read_safetensors(path), PLAIN)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ids": "../model-2.safetensors"}, "no plain name"),
        ({"ids": "/etc/x.safetensors"}, "no plain name"),
        ({"ids": "..safetensors"}, "no plain name"),
        ({"ids": "model-1.safetensors"}, "ids"),
        ({"more": "model-2.safetensors"}, "more"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, changes, message):
    path = sharded(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read_safetensors(path)


def test_a_missing_shard_is_named(tmp_path):
    path = sharded(tmp_path, more="model-3.safetensors")
    with pytest.raises(UserError, match=r"model-3\.safetensors"):
        read_safetensors(path)


@pytest.mark.parametrize("reader", [read_torch, read_safetensors, read_npz])
def test_what_is_no_file_is_refused(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    write_file(tmp_path, b"", "empty")
    write_file(tmp_path, b"<html>not found</html>" * 10, "page")
    for name in ("pipe", "empty", "page"):
        refused(reader, tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        reader(tmp_path / "missing")
    with pytest.raises(UserError):
        reader(tmp_path)


# Hostile files.


class Runs:
    """A class whose pickle calls a function."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "call, name", [(os.system, "posix.system"), (eval, "eval"), (exec, "exec"), (open, "io.open")]
)
def test_a_pickle_that_runs_a_command_is_refused_by_name(tmp_path, protocol, call, name):
    marker = tmp_path / "ran"
    arg = f"touch {marker}" if call is os.system else f"open({str(marker)!r}, 'w')"
    for value in (Runs(call, arg), {"weight": 1, "optimizer": [Runs(call, arg)]}):
        path = write_torch(tmp_path / "x.pt", pickle.dumps(value, protocol))
        line = refused(read_torch, path)
        assert name in line and "nothing in it was run" in line
    assert not marker.exists()


@pytest.mark.parametrize(
    "program, message",
    [
        (b"\x80\x02cos\nsystem\n.", "os.system"),
        (b"\x80\x02c__torch__\nM\n)R.", "__torch__.M"),
        (b"\x80\x02c__torch__.os\nsystem\nX\x02\x00\x00\x00id\x85R.", "__torch__.os.system"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.", "_rebuild_tensor_v2"),
        (b"\x80\x02cos\x1b[2J\nsystem\n.", r"os\x1b[2J.system"),
        (b"\x80\x02cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"\x80\x02i os\nsystem\n.", "0x69"),
        (b"\x80\x00].", "protocol 0"),
        (b"\x80\x02r\xff\xff\xff\xff.", "stack"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "NoneType"),
        (b"\x80\x02\x8d" + b"\xff" * 8 + b".", "ends in the middle"),
        (b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", "128 bits"),
        (b"\x80\x02})Ns.", "tuple as a key"),
        (b"\x80\x02NN(0t.", "than it put there"),
        (b"\x80\x02}" + b")" + b"\x85" * 15_000 + b"Ns.", "tuple as a key"),
        (b"\x80\x02" + b"}" * 60_000, "steps"),
        (b"\x80\x02" + b"(" * 60_000, "steps"),
        (b"\x80\x02" + b"]q\x00" + b"h\x00a" * 12_000, "steps"),
    ],
)
def test_a_hostile_pickle_is_refused_in_bounded_steps(tmp_path, program, message, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_STEPS", 20_000)
    path = write_torch(tmp_path / "x.pt", program)
    assert message in refused(read_torch, path)


def tensor_pickle(offset, shape, strides, count=6, key=b"0", kind=b"Float"):
    """Return the pickle of a state dict {"w": tensor} with any numbers in it."""

    def number(value):
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value

    storage = b"(%sctorch\n%sStorage\n%s%s%stQ" % (
        text(b"storage"),
        kind,
        text(key),
        text(b"cpu"),
        number(count),
    )
    sizes = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides)]
    tail = b"\x89ccollections\nOrderedDict\n)Rt"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + b"".join(sizes)
    return b"\x80\x02}" + text(b"w") + tensor + tail + b"Rs."


SIX = np.arange(6, dtype=np.float32)


def test_the_pickle_made_here_is_a_sound_one(tmp_path):
    for args, expected in {
        (0, (2, 3), (3, 1)): SIX.reshape(2, 3),
        (1, (2, 2), (1, 2)): np.array([[1, 3], [2, 4]], np.float32),
        (5, (1, 1), (1 << 60, 7)): SIX[5:].reshape(1, 1),
        (6, (0, 4), (4, 1)): np.zeros((0, 4), np.float32),
        (0, (2, 2, 1), (0, 1, 1)): np.array([[[0], [1]]] * 2, np.float32),
    }.items():
        path = write_torch(tmp_path / "x.pt", tensor_pickle(*args), [("0", SIX.tobytes())])
        assert same(read_torch(path), {"w": expected})


@pytest.mark.parametrize(
    "args",
    [
        (1, (2, 3), (3, 1)),
        (0, (2, 3), (4, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (2, 3), (3,)),
        (0, (1,) * 9, (1,) * 9),
        (0, (7,), (0,)),
        (0, (1 << 62, 1 << 62, 0), (1, 1, 1)),
        (0, (1 << 40,), (0,)),
        (0, (1 << 64,) * 1000, (1,) * 1000),
        (0, (2, 3), (3, 1), 5),
        (0, (2, 3), (3, 1), 1 << 61),
        (0, (2, 3), (3, 1), -6),
        (0, (2, 3), (3, 1), 6, b"1"),
        (0, (2, 3), (3, 1), 6, b"../data.pkl"),
        (0, (2, 3), (3, 1), 6, b"0", b"Long"),
        (0, (2, 3), (3, 1), 6, b"0", b"ComplexFloat"),
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path, args):
    path = write_torch(tmp_path / "x.pt", tensor_pickle(*args), [("0", SIX.tobytes())])
    refused(read_torch, path)


def test_many_copies_of_one_storage_are_refused(tmp_path):
    """A thousand transposed windows on one storage would take a thousand times its memory."""
    body = tensor_pickle(0, (2, 3), (1, 2))
    tensor = body[body.index(b"ctorch._utils") : -2]
    names = b"".join(b"X\x04\x00\x00\x00%04d" % i + tensor for i in range(1000))
    many = b"\x80\x02}(" + names + b"u."
    path = write_torch(tmp_path / "x.pt", many, [("0", SIX.tobytes())])
    assert len(read_torch(path)) == 1000  # 24 kB of copies, from 200 kB of pickle
    memo = b"\x80\x02" + tensor + b"q\x000}("
    memo += b"".join(b"\x8c\x03%03dh\x00" % i for i in range(1000)) + b"u."
    path = write_torch(tmp_path / "x.pt", memo, [("0", SIX.tobytes())])
    assert "more numbers" in refused(read_torch, path)


@pytest.mark.parametrize("share", [b"h\x00", b""])
def test_a_module_that_contains_itself_is_refused(tmp_path, share):
    new = b"c__torch__\nM\n)\x81"
    if share:
        program = new + b"q\x00}\x8c\x01ah\x00sb."
    else:  # thirty levels of two equal children: a billion paths
        program = new
        for _ in range(30):
            program = program + b"q\x010" + new + b"}(\x8c\x01ah\x01\x8c\x01bh\x01ub"
        program += b"."
    path = write_torch(tmp_path / "x.pt", b"\x80\x02" + program)
    assert "larger or deeper" in refused(read_torch, path)


def zip_cases():
    """Yield archives that break one rule each, made from a sound one, and the message for each."""
    sound = FILES["torch"][2]
    first, last = sound.index(b"PK\1\2"), sound.rindex(b"PK\1\2")
    end64, end = sound.rindex(b"PK\6\6"), sound.rindex(b"PK\5\6")

    def changed(at, data):
        return sound[:at] + data + sound[at + len(data) :]

    yield "packed beyond the file", changed(first + 20, b"\xff\xff\xff\x7f"), "more bytes than"
    yield "another size", changed(first + 24, b"\1\0\0\0"), "two sizes"
    yield "a start outside", changed(first + 42, b"\xff\xff\xff\x7f"), "outside of the file"
    yield "another's start", changed(last + 42, bytes(4)), "not what the directory says"
    yield "encrypted", changed(first + 8, b"\x01\x08"), "encrypted"
    # Numbers that the members do not need: some versions of zipfile pass over them.
    yield "more members", changed(end64 + 24, b"\xff\0\0\0\0\0\0\0" * 2), None
    yield "fewer members", changed(end64 + 24, b"\1\0\0\0\0\0\0\0" * 2), None
    yield "a billion members", changed(end64 + 24, b"\0\0\0\x7f\0\0\0\0" * 2), None
    yield "an end elsewhere", changed(end64 + 56 + 8, b"\xff" * 8), None
    yield "a second disk", changed(end + 4, b"\1"), None
    yield (
        "another count",
        changed(end + 10, b"\x14"),
        "21 members in its zip directory and counts 20",
    )
    yield "a longer directory", changed(end64 + 40, b"\xff" * 8), "directory cannot be read"
    yield "a huge directory", sound[:-22] + bytes(5 << 20) + huge_end(5 << 20), "any checkpoint"
    yield "a comment", changed(len(sound) - 2, b"\1"), "no zip directory at its end"
    yield "bytes behind it", sound + bytes(22), "no zip directory at its end"
    yield "bytes before it", sound[:first] + sound, "other bytes before"
    yield "a hidden member", overlapping(), "overlaps"


def huge_end(size):
    """Return the end record of a directory of so many bytes."""
    return struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0, 0, size, 0, 0)


def overlapping():
    """Return an archive whose second member lies inside the first one's bytes."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("b", b"1234")
    inside = inner.getvalue()
    cut, end = inside.index(b"PK\1\2"), inside.index(b"PK\5\6")
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("a", inside[:cut])
    around = outer.getvalue()
    start, record = around.index(b"PK\1\2"), inside[cut:end]
    record = record[:42] + struct.pack("<I", around.index(inside[:cut])) + record[46:]
    stop = around.rindex(b"PK\5\6")
    length = stop - start + len(record)
    end_record = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, length, start, 0)
    return around[:stop] + record + end_record


@pytest.mark.parametrize("data, message", [pytest.param(*c, id=n) for n, *c in zip_cases()])
def test_an_archive_that_breaks_a_rule_is_refused(tmp_path, data, message):
    path = write_file(tmp_path, data)
    if message is not None:
        assert message in refused(read_torch, path)
        return
    try:
        assert same(read_torch(path), STATE)
    except UserError:
        refused(read_torch, path)


def test_the_wide_fields_of_a_large_archive_are_read(tmp_path, monkeypatch):
    """Beyond 4 GiB sizes and places stand in an extra field; here everything counts as beyond."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 8)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    description, storages = reader_cases.read_parts(GOLDEN / "state_dict.pt")
    path = write_torch(tmp_path / "x.pt", description, storages)
    assert path.read_bytes().count(b"\xff\xff\xff\xff") > 2 * len(storages)
    assert same(read_torch(path), STATE)


def test_a_storage_of_two_sizes_is_refused(tmp_path):
    one, two = (tensor_pickle(0, (2,), (1,), count) for count in (6, 5))
    both = one[:-1] + two[3:].replace(b"\0w", b"\0v", 1)
    path = write_torch(tmp_path / "x.pt", both, [("0", SIX.tobytes())])
    assert "two sizes" in refused(read_torch, path)


def test_a_tensor_stored_negated_is_refused(tmp_path):
    flagged = tensor_pickle(0, (6,), (1,)).replace(b")Rt", b")R}\x8c\x03neg\x88st")
    path = write_torch(tmp_path / "x.pt", flagged, [("0", SIX.tobytes())])
    assert "not read here" in refused(read_torch, path)


@pytest.mark.parametrize("shape", ["(7,)", "(2, 2)", "()", "(99999, 99999)", "(0, 6)", "(6L,)"])
def test_an_npz_member_of_another_size_is_refused(tmp_path, shape):
    good = npz_bytes({"a": SIX})
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        member = archive.read("a.npy")
    changed_shape = f"{shape}, }}".ljust(7).encode()
    changed = member.replace(b"(6,), }".ljust(len(changed_shape)), changed_shape)
    assert len(changed) == len(member) and changed != member
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", changed)
    refused(read_npz, tmp_path / "x.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_zipfile_would_take_are_refused(tmp_path):
    good, storage = tensor_pickle(0, (2, 3), (3, 1)), [("0", SIX.tobytes())]
    path = tmp_path / "x.pt"
    assert "twice" in refused(read_torch, write_torch(path, good, storage * 2))
    two = write_torch(path, good, storage, **{"more/data.pkl": good})
    assert "2 members data.pkl" in refused(read_torch, two)
    big = write_torch(path, good, storage, byteorder=b"big")
    assert "little-endian" in refused(read_torch, big)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", good)
        archive.writestr("archive/data/0", SIX.tobytes() * 1000)
    assert "compressed" in refused(read_torch, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/weights.bin", b"")
    assert "0 members data.pkl" in refused(read_torch, path)


def test_an_array_that_unfolds_beyond_its_file_is_refused(tmp_path):
    bomb = npz_bytes({"a": np.zeros(4 << 20)}, np.savez_compressed)
    path = write_file(tmp_path, bomb, "x.npz")
    tracemalloc.start()
    assert "declares" in refused(read_npz, path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    # The same, lying about the size in the directory.
    at = bomb.index(b"PK\1\2") + 24
    path = write_file(tmp_path, bomb[:at] + struct.pack("<I", 1000) + bomb[at + 4 :], "x.npz")
    assert "does not inflate" in refused(read_npz, path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "array", [np.array([{}], object), np.zeros(2, ">f4"), np.zeros(2, "U3"), np.zeros(2, "i4,f4")]
)
def test_an_npz_of_other_than_plain_numbers_is_refused(tmp_path, array):
    refused(read_npz, write_file(tmp_path, npz_bytes({"a": array}), "x.npz"))


def test_fortran_order_is_kept(tmp_path):
    array = np.asfortranarray(reader_cases.numbers((3, 4)))
    assert same(read_npz(write_file(tmp_path, npz_bytes({"a": array}), "x.npz")), {"a": array})


ENTRY = '{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}'


@pytest.mark.parametrize(
    "header, message",
    [
        ('{"a":%s,"a":%s}', "twice"),
        (
            '{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,25]}}',
            "invalid shape, data type, or offset",
        ),
        (
            '{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28]}}',
            "invalid offset for tensor `a`",
        ),
        ('{"a":{"dtype":"F32","shape":[1,3],"data_offsets":[0,12]}}', "not fully covered"),
        ('{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}', "not fully covered"),
        ('{"a":%s,"b":%s}', "invalid offset for tensor"),
        ('{"a":{"dtype":"F32","shape":[-2,-3],"data_offsets":[0,24]}}', "integer `-2`"),
        ('{"a":{"dtype":"F32","shape":[2,3.0],"data_offsets":[0,24]}}', "floating point `3.0`"),
        ('{"a":{"dtype":"F32","shape":[true,6],"data_offsets":[0,24]}}', "boolean `true`"),
        ('{"a":{"dtype":"F8_E4M3","shape":[24],"data_offsets":[0,24]}}', "F8_E4M3"),
        ('{"a":{"dtype":"F32","shape":[2,3]}}', "missing field `data_offsets`"),
        ('{"a":[]}', "invalid length 0"),
        ("[]", "not an object"),
        ('{"a":', "JSON"),
        ("[" * 100_000, "JSON"),
        ('{"a":' + "9" * 5000 + "}", "JSON"),
        (
            '{"a":{"dtype":"F32","shape":[%s0],"data_offsets":[0,0]},"b":%%s}' % ("0," * 40),
            "is not made of sizes",
        ),
    ],
)
def test_a_bad_safetensors_header_gets_one_line(tmp_path, header, message):
    data = safetensors_bytes({}, header.replace("%s", ENTRY).encode(), SIX.tobytes())
    assert message in refused(read_safetensors, write_file(tmp_path, data, "x.safetensors"))


@pytest.mark.parametrize("length", [25, 1 << 40, (1 << 64) - 1])
def test_a_safetensors_header_longer_than_its_file_is_refused(tmp_path, length):
    data = length.to_bytes(8, "little") + b"{}" + bytes(20)
    assert "declares a header" in refused(read_safetensors, write_file(tmp_path, data, "x"))


# Damaged files.

DAMAGES = {
    "cut": lambda rng, data: data[: rng.integers(len(data))],
    "bit": lambda rng, data: flip_bits(data, rng.integers(len(data)), 1 << rng.integers(8)),
    "byte": lambda rng, data: flip_bits(data, rng.integers(len(data)), rng.integers(1, 256)),
    "end": lambda rng, data: flip_bits(data, -rng.integers(1, 120), 1 << rng.integers(8)),
    "hole": lambda rng, data: cut_out(data, *np.sort(rng.integers(len(data), size=2))),
    "zeros": lambda rng, data: set_to_zero(data, *np.sort(rng.integers(len(data), size=2))),
    "more": lambda rng, data: data + rng.bytes(rng.integers(1, 40)),
    "twice": lambda rng, data: data + data,
}


def flip_bits(data, at, mask):
    changed = bytearray(data)
    changed[at] ^= int(mask)
    return bytes(changed)


def cut_out(data, start, stop):
    return data[:start] + data[max(stop, start + 1) :]


def set_to_zero(data, start, stop):
    return data[:start] + bytes(stop - start) + data[stop:]


ARCHIVES = [name for name in FILES if name != "safetensors"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_damaged_archive_gives_the_right_arrays_or_one_line(tmp_path, name, damage):
    check_damages(tmp_path, name, damage, 25)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ARCHIVES)
def test_many_damaged_archives_do(tmp_path, name, damage):
    check_damages(tmp_path, name, damage, 5_000)


def check_damages(tmp_path, name, damage, rounds):
    """Check that every byte that matters stands under a checksum or in two places."""
    reader, file_name, data, expected = FILES[name]
    rng = np.random.default_rng([rounds, [*FILES].index(name), [*DAMAGES].index(damage)])
    refusals = 0
    for _ in range(rounds):
        path = write_file(tmp_path, DAMAGES[damage](rng, data), file_name)
        try:
            arrays = reader(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refusals += 1
        else:
            assert same(arrays, expected)
        path.unlink()
    assert refusals >= 5 or damage in ("bit", "byte", "end", "zeros")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_safetensors_header_gives_the_right_arrays_or_one_line(tmp_path, damage):
    """The format has no checksum: names may change, which the name maps notice; sizes may not."""
    # Of a tensor without numbers, the sizes beside the zero stand in no second place.
    plain = {name: array for name, array in PLAIN.items() if array.size}
    data = safetensors_bytes(plain)
    header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng([*DAMAGES].index(damage))
    for _ in range(40):
        changed = DAMAGES[damage](rng, data[:header]) + data[header:]
        path = write_file(tmp_path, changed, "x.safetensors")
        try:
            arrays = read_safetensors(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert same(dict(zip(plain, arrays.values(), strict=True)), plain)
        path.unlink()


@pytest.mark.parametrize("name", ["state_dict", "wrapper", "torchscript"])
def test_a_damaged_pickle_with_a_right_checksum_breaks_nothing(tmp_path, name):
    """Whoever writes the checksum may describe any tensors, but only those the file holds."""
    description, storages = reader_cases.read_parts(GOLDEN / f"{name}.pt")
    rng = np.random.default_rng(len(name))
    refusals = 0
    for i in range(200):
        damage = list(DAMAGES.values())[i % len(DAMAGES)]
        path = write_torch(tmp_path / "x.pt", damage(rng, description), storages)
        try:
            arrays = read_torch(path)
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
        else:
            size = path.stat().st_size
            assert all(array.nbytes <= size for array in arrays.values())
            sum(int(array.view(np.uint8).sum()) for array in arrays.values() if array.ndim)
    assert refusals > 50


OPCODES = st.sampled_from([bytes([opcode]) for opcode in _STEPS] + [b"."])
WORDS = st.sampled_from(
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nFloatStorage\n",
        b"ccollections\nOrderedDict\n",
        b"c__torch__\nM\n",
        b"ctorch.jit._pickle\nrestore_type_tag\n",
        b"X\x07\x00\x00\x00storage",
        b"\x8c\x010",
        b"K\x02",
        b"q\x01",
        b"h\x01",
        b"})R",
        b"()\x85\x86\x87t",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.lists(st.one_of(OPCODES, WORDS, WORDS, st.binary(max_size=3)), max_size=40).map(
            b"".join
        ),
    )
)
def test_any_program_ends_in_a_value_or_one_error(program):
    try:
        load_pickle(b"\x80\x02" + program)
    except BadFileError as error:
        assert "\n" not in str(error)


def test_the_limit_on_steps_leaves_room():
    """Ten thousand tensors are ten times those of the largest CLIP, or twice with an optimizer."""
    body = tensor_pickle(0, (2, 3), (3, 1))
    tensor = body[body.index(b"ctorch._utils") : -2]
    entries = b"".join(b"\x8c\x04%04d" % i + tensor for i in range(10_000))
    assert len(load_pickle(b"\x80\x02}(" + entries + b"u.")) == 10_000


# Resizing.


def test_resized_positions_keep_the_prefix_and_a_constant():
    positions_LD = np.full((2 + 49, 5), 0.25, np.float32)
    positions_LD[:2] = [[7], [8]]
    for grid in [(3, 9), (14, 14), (1, 1)]:
        new_LD = resize_image_positions(positions_LD, (7, 7), grid, prefix_tokens=2)
        assert new_LD.shape == (2 + grid[0] * grid[1], 5) and new_LD.dtype == np.float32
        np.testing.assert_array_equal(new_LD[:2], positions_LD[:2])
        # The weights of a point sum to one, to the last digit of float32.
        np.testing.assert_allclose(new_LD[2:], 0.25, rtol=1e-6)
    assert resize_image_positions(positions_LD, (7, 7), (7, 7), 2) is positions_LD
    with pytest.raises(UserError, match="51 rows"):
        resize_image_positions(positions_LD, (8, 8), (7, 7), 2)


def test_resized_texts_follow_a_line():
    """Linear filters reproduce a line wherever no neighbor is missing."""
    positions_LD = np.arange(20, dtype=np.float32)[:, None] * np.array([1, -2], np.float32)
    new_LD = resize_text_positions(positions_LD, 33)
    at_P = ((np.arange(33) + 0.5) * 20 / 33 - 0.5).clip(0, 19)
    # One rounding to float32 of numbers below 40.
    np.testing.assert_allclose(new_LD, at_P[:, None] * np.array([1, -2]), atol=4e-6)
    assert resize_text_positions(positions_LD, 20) is positions_LD
