"""The same six pairs in every format, each written by the library whose format it is."""

import csv
import json
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from array_record.python import array_record_module
from data_cases import encode, make_image

from clip_jax.data.formats import records

COUNT = 6
IMAGES = [encode(make_image("RGB", 14, 12, seed=k), "PNG") for k in range(COUNT)]
CAPTIONS = [f"caption {k}, é" for k in range(COUNT)]


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def example(features: dict[str, bytes | int | float]) -> bytes:
    """Encode a tf.train.Example by the published wire format."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        elif isinstance(value, float):
            feature = field(2, field(1, struct.pack("<f", value)))
        else:
            feature = field(3, field(1, varint(value % 2**64)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def example_of(k: int) -> bytes:
    return example({"image": IMAGES[k], "caption": CAPTIONS[k].encode(), "label": k})


def write_images(folder):
    for k, data in enumerate(IMAGES):
        (folder / f"p{k}.png").write_bytes(data)


def write_tar(folder):
    with webdataset.TarWriter(str(folder / "0.tar")) as writer:
        for k in range(COUNT):
            sample = {"__key__": f"{k:09d}", "png": IMAGES[k], "txt": CAPTIONS[k], "cls": k}
            writer.write(sample | {"json": {"caption": "other", "width": 100 * k}})
    return folder / "0.tar"


def write_csv(folder, delimiter=",", ending="csv"):
    write_images(folder)
    with open(folder / f"t.{ending}", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["filepath", "title", "label", "width"])
        rows.writerows([f"p{k}.png", CAPTIONS[k], k, 100 * k] for k in range(COUNT))
    return folder / f"t.{ending}"


def write_jsonl(folder):
    write_images(folder)
    lines = [
        json.dumps({"file_name": f"p{k}.png", "text": CAPTIONS[k], "label": k, "width": 100 * k})
        for k in range(COUNT)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder  # found by the folder's name alone


def write_parquet(folder, struct_column=False):
    image = [{"bytes": p, "path": "x.png"} for p in IMAGES] if struct_column else IMAGES
    table = pa.table(
        {
            "image": image,
            "caption": CAPTIONS,
            "label": list(range(COUNT)),
            "width": [100 * k for k in range(COUNT)],
        }
    )
    pq.write_table(table, folder / "t.parquet", row_group_size=4)
    return folder / "t.parquet"


def write_parquet_paths(folder):
    write_images(folder)
    paths = [f"p{k}.png" for k in range(COUNT)]
    table = pa.table({"path": paths, "caption": CAPTIONS, "label": list(range(COUNT))})
    pq.write_table(table, folder / "t.parquet")
    return folder / "t.parquet"


def write_tfrecord(folder):
    with open(folder / "t.tfrecord-00000-of-00001", "wb") as file:
        for k in range(COUNT):
            data = example_of(k)
            head = struct.pack("<Q", len(data))
            file.write(head + struct.pack("<I", records.masked_crc(head)))
            file.write(data + struct.pack("<I", records.masked_crc(data)))
    return folder / "t.tfrecord-00000-of-00001"


def write_array_record(folder):
    writer = array_record_module.ArrayRecordWriter(str(folder / "t.array_record"), "group_size:1")
    for k in range(COUNT):
        writer.write(example_of(k))
    writer.close()
    return folder / "t.array_record"


def write_files(folder):
    """Write img2dataset's "files" layout."""
    (folder / "00000").mkdir()
    for k in range(COUNT):
        (folder / "00000" / f"{k:09d}.png").write_bytes(IMAGES[k])
        (folder / "00000" / f"{k:09d}.txt").write_text(CAPTIONS[k])
    return folder


FORMATS = {
    "tar": write_tar,
    "csv": write_csv,
    "tsv": lambda folder: write_csv(folder, "\t", "tsv"),
    "tabs in .csv": lambda folder: write_csv(folder, "\t"),
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "parquet of structs": lambda folder: write_parquet(folder, True),
    "parquet of paths": write_parquet_paths,
    "tfrecord": write_tfrecord,
    "array_record": write_array_record,
    "files": write_files,
}
NO_LABEL = {"files"}
