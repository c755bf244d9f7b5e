"""The arrays in the checkpoint files of tests/golden/, and files of the other formats like them.

`tests/parity/make_reader_files.py` writes the golden files with torch from these arrays.
"""

import json
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def numbers(shape, dtype="float32", start=-3):
    """Return small multiples of a quarter, which every float type holds exactly."""
    values = np.arange(np.prod(shape, dtype=int)) + start
    step = 0.25 if np.dtype(dtype).kind in "fV" else 1
    return (values * step).astype(dtype).reshape(shape)


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STATE = {
    "visual.conv1.weight": numbers((4, 3, 2, 2)),
    "visual.proj": numbers((3, 5), "float16"),
    "text_projection": numbers((3, 4), BFLOAT16),
    "logit_scale": numbers((), start=10),
    "turned": np.ascontiguousarray(numbers((5, 3)).T),
    "middle": numbers((3, 4, 5))[1],
    "every_second": np.ascontiguousarray(numbers((4, 6))[:, ::2]),
    "tied": numbers((4, 3, 2, 2)),
    "nothing": numbers((0, 3)),
    "bn.num_batches_tracked": numbers((), "int64", start=7),
    **{name: numbers((2, 3), name) for name in ("float64", "int32", "int16", "int8")},
    "uint8": numbers((2, 3), "uint8", start=3),
    "bool": np.array([True, False, True]),
}
"""`state_dict.pt`; `wrapper.pt` holds `WRAPPED` in a training wrapper."""

WRAPPED = {f"module.{name}": STATE[name] for name in ("visual.conv1.weight", "visual.proj")}

SCRIPT = {
    "input_resolution": numbers((), "int64", start=224),
    "visual.conv.weight": numbers((4, 3, 2, 2), "float16"),
    "visual.bn.weight": numbers((4,), start=1),
    "visual.bn.bias": numbers((4,), start=2),
    "visual.bn.running_mean": numbers((4,), start=3),
    "visual.bn.running_var": numbers((4,), start=4),
    "visual.bn.num_batches_tracked": numbers((), "int64", start=9),
    "fc.weight": numbers((5, 4), "float16"),
    "fc.bias": numbers((5,), "float16", start=2),
}
"""`torchscript.pt`, a scripted module with float16 weights and float32 batch norm."""

PLAIN = {
    "params/img/embedding/kernel": numbers((2, 2, 3, 4)),
    "params/img/pos_embedding": numbers((1, 4, 4), "float16"),
    "params/txt/Embed_0/embedding": numbers((5, 4), BFLOAT16),
    "params/t": numbers((1,)),
    "params/b": numbers((), start=-10),
    "ids": numbers((3, 2), "int64"),
    "mask": np.array([True, False, True]),
    "nothing": numbers((0, 3)),
}
"""For the formats that are written here."""

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}


def safetensors_bytes(arrays, header=None, data=None):
    """Return the bytes of a safetensors file; `header` replaces the JSON text."""
    entries, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        stop = len(blob) + array.nbytes
        entries[name] = {
            "dtype": TYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(blob), stop],
        }
        blob += array.tobytes()
    text = json.dumps(entries).encode() if header is None else header
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + (blob if data is None else data)


def write_torch(path, pickle, storages=(), **extra):
    """Write an archive like those of torch.save around any pickle; `storages` are (key, bytes)."""
    members = {"data.pkl": pickle, "byteorder": b"little", **extra}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
        for key, data in storages:
            archive.writestr(f"archive/data/{key}", data)
    return path


def read_parts(path):
    """Return the pickle and the storages of an archive of torch.save."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickle = next(archive.read(name) for name in names if name.endswith("/data.pkl"))
        return pickle, [(n.split("/")[-1], archive.read(n)) for n in names if "/data/" in n]


def same(arrays, expected):
    """Return whether names, shapes, types and bits are equal."""
    return arrays.keys() == expected.keys() and all(
        arrays[name].dtype == array.dtype
        and arrays[name].shape == array.shape
        and arrays[name].tobytes() == array.tobytes()
        for name, array in expected.items()
    )
