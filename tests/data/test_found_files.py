"""Files as people have them: nothing is read wrong, and nothing is left out, without a word."""

import csv
import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clip_jax.data.dataset import open_all_shards
from clip_jax.data.formats import webdataset
from clip_jax.data.images import ImageError, decode_image, eval_transform
from clip_jax.data.shards import (
    BadSampleError,
    Handles,
    caption_lines,
    caption_values,
    hash_image,
    parse_label,
)
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.sources import expand, open_shards
from clip_jax.data.survey import SurveyCounts, survey
from clip_jax.data.writing.tar_writer import Shrink, read_sample
from clip_jax.embeddings.write import open_images
from clip_jax.errors import UserError, note


def image_bytes(color="red", fmt="PNG", mode="RGB"):
    """Return a small encoded image."""
    out = io.BytesIO()
    Image.new("RGB", (9, 7), color).convert(mode).save(out, fmt)
    return out.getvalue()


def write_tar(path, members):
    """Write members in order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def read(source):
    """Return each sample's captions, or its cause."""
    found = []
    for shard in open_shards(expand(source)):
        with Handles() as handles:
            for i in range(len(shard)):
                try:
                    found.append(shard.captions(i, handles))
                except BadSampleError as e:
                    found.append(e.cause)
    return found


def counts_of(source):
    """Return the counts of all samples of a source."""
    return counts_of_shards(open_shards(expand(source)))


def counts_of_shards(shards):
    """Return the counts of all samples of shards."""
    total = SurveyCounts()
    for part in survey(shards, np.arange(sum(map(len, shards))), lambda t: [1] * len(t), threads=1):
        total.add(part)
    return total


@pytest.fixture
def folder(tmp_path):
    """Return a folder with five images."""
    (tmp_path / "img").mkdir()
    for k, color in enumerate(("red", "green", "blue", "white", "black")):
        (tmp_path / f"img/{k}.png").write_bytes(image_bytes(color))
    return tmp_path


def write_csv(path, rows, delimiter=","):
    """Write a table by the rules of CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


LINES = "one\ntwo\r\nthree\n\nfour\u2028five\x0csix\x85seven"
ONE = "one two three four\u2028five\x0csix\x85seven"


def test_a_field_is_one_caption_whatever_its_line_ends(folder):
    rows = [("filepath", "title"), ("img/0.png", LINES), ("img/1.png", "plain")]
    expected = [[ONE], ["plain"]]
    assert read(write_csv(folder / "a.csv", rows)) == expected
    assert read(write_csv(folder / "a.tsv", rows, "\t")) == expected
    lines = [json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:]]
    (folder / "a.jsonl").write_text("\n".join(lines))
    assert read(str(folder / "a.jsonl")) == expected
    pq.write_table(
        pa.table({"filepath": ["img/0.png", "img/1.png"], "title": [LINES, "plain"]}),
        folder / "a.parquet",
    )
    assert read(str(folder / "a.parquet")) == expected
    pq.write_table(
        pa.table({"image": [image_bytes()] * 2, "text": [[LINES, "b\nc"], ["plain"]]}),
        folder / "b.parquet",
    )
    assert read(str(folder / "b.parquet")) == [[ONE, "b c"], ["plain"]]
    members = [("0.png", image_bytes()), ("0.json", json.dumps({"caption": LINES}).encode())]
    assert read(write_tar(folder / "j.tar", members)) == [[ONE]]


def test_only_a_line_feed_parts_the_captions_of_a_txt_and_an_option_turns_that_off(folder):
    tar = write_tar(folder / "t.tar", [("0.png", image_bytes()), ("0.txt", LINES.encode())])
    assert read(tar) == [["one", "two", "three", "four\u2028five\x0csix\x85seven"]]
    assert read(f"{tar}#txt=whole") == [[ONE]]
    (folder / "img/0.txt").write_text("a b\nc\u2029d", encoding="utf-8")
    assert read(str(folder / "img"))[0] == ["a b", "c\u2029d"]
    from clip_jax.data.sources import open_shard

    with Handles() as handles:
        assert open_shard(f"{folder / 'img'}#txt=whole").captions(0, handles) == ["a b c\u2029d"]
    with pytest.raises(UserError, match="txt"):
        open_shards([f"{tar}#txt=word"])


def test_a_blank_txt_gives_way_to_a_caption_beside_it(folder):
    members = [("0.png", image_bytes()), ("0.txt", b" \n"), ("0.json", b'{"caption": "good"}')]
    members += [("1.png", image_bytes()), ("1.txt", b""), ("1.json", b'{"caption": ""}')]
    members += [("2.png", image_bytes()), ("2.txt", b""), ("2.json", b"{")]
    tar = write_tar(folder / "t.tar", members)
    assert read(tar) == [["good"], "empty_caption", "empty_caption"]
    for name, data in members:
        (folder / "img" / name).write_bytes(data)
    (folder / "img/3.json").write_text('{"caption": 7}')
    assert read(str(folder / "img"))[:4] == [["good"], "empty_caption", "empty_caption", ["7"]]


def test_numbers_are_captions():
    assert caption_values([5, 2.5, "x"]) == ["5", "2.5", "x"]
    for value in (None, float("nan"), True, [], {}):
        with pytest.raises(BadSampleError, match="no_caption"):
            caption_values(value)


@pytest.mark.parametrize(
    "text",
    [
        'img/0.png,"a red one\nimg/1.png,green\nimg/2.png,blue\n',
        'img/0.png,"a red one\nimg/1.png,"green"\nimg/2.png,blue\n',
        'img/0.png,"a ""red"" one\nimg/1.png,green\n',
        'img/0.png,"a"\nimg/1.png,"b\nimg/2.png,c" x\n',
        '"img/0.png,a\nimg/1.png,"b"\nimg/2.png,c\n',
    ],
)
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_quote_that_is_not_closed_is_told(folder, text, ending):
    path = folder / f"q.{ending}"
    text = "filepath,title\n" + text
    path.write_text(text if ending == "csv" else text.replace(",", "\t"))
    with pytest.raises(UserError, match=r"row \d, line \d.*not closed|cannot be read"):
        open_shards(expand(str(path)))


def test_quotes_that_are_closed_or_stand_inside_are_read(folder):
    path = folder / "q.csv"
    path.write_text('filepath,title\nimg/0.png,a 5" nail\nimg/1.png,"two\nlines, ""so"""\n\n')
    assert read(str(path)) == [['a 5" nail'], ['two lines, "so"']]


def test_a_column_of_words_is_no_label(folder):
    rows = [("filepath", "title", "label"), ("img/0.png", "a", "cat"), ("img/1.png", "b", "dog")]
    table = write_csv(folder / "t.csv", rows)
    assert counts_of(table).bad == {}
    assert counts_of(f"{table}#label=label").bad == {"bad_label": 2}
    for name in ("cls", "class"):
        lines = [{"file_name": "img/0.png", "text": "a", name: "cat"}]
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert counts_of(str(folder / "t.jsonl")).bad == {}
    members = [("0.png", image_bytes()), ("0.txt", b"a"), ("0.cls", b"a cat")]
    assert counts_of(write_tar(folder / "t.tar", members)).bad == {}
    columns = {"image": [image_bytes()], "text": ["a"], "label": [["cat", "dog"]]}
    pq.write_table(pa.table(columns), folder / "t.parquet")
    assert counts_of(str(folder / "t.parquet")).bad == {}


def test_a_number_is_a_label_however_it_is_written():
    for value in (3, "3", b" 3\n", 3.0, "3.0", b"3.00", np.int64(3).item()):
        assert parse_label(value) == 3
    for value in (None, float("nan"), "", b"-1", -1, -1.0, "-1"):
        assert parse_label(value) == -1
    others = ["cat", 2.5, "2.5", True, ["a"], {"x": 1}]
    for value in (2**31, "-2", "9999999999", -7, b"\xff\xfe", *others):
        assert parse_label(value, named=False) == -1
        with pytest.raises(BadSampleError, match="bad_label"):
            parse_label(value)


@pytest.mark.parametrize("fmt, suffix", [("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif")])
def test_other_formats_are_read(fmt, suffix):
    data = image_bytes("#336699", fmt)
    assert (
        np.array_equal(
            eval_transform(decode_image(data), 4),
            eval_transform(decode_image(image_bytes("#336699")), 4),
        )
        or fmt == "GIF"
    )
    small = decode_image(Shrink(3)(data))
    assert min(small.size) == 3
    for cut in range(1, len(data) - 1, 5):
        with pytest.raises(ImageError):
            decode_image(data[:cut])


@pytest.mark.parametrize("mode", ["I;16", "F", "I"])
def test_a_tiff_of_other_values_is_refused(mode):
    with pytest.raises(ImageError, match="no 8 bits"):
        decode_image(image_bytes("white", "TIFF", mode if mode != "I;16" else "I;16"))


def test_a_png_of_16_bits_is_told(capsys):
    note.cache_clear()
    assert decode_image(image_bytes("white", "PNG", "I;16")).mode == "I;16"
    assert "PNG images of 16 bits: values above 255 become white" in capsys.readouterr().err


def test_every_image_of_a_folder_is_read_or_named(tmp_path, capsys):
    for name, fmt in [
        ("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.jpeg", "JPEG"), ("d.webp", "WEBP"),
        ("e.gif", "GIF"), ("f.bmp", "BMP"), ("g.tif", "TIFF"), ("h.TIFF", "TIFF"),
        ("i.jfif", "JPEG"), ("no_suffix", "PNG"), ("j.jpg?w=20", "JPEG"), ("photo.123", "PNG"),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(image_bytes(fmt=fmt))
    for name in ("k.heic", "l.avif", "m.svg", "n.psd"):
        (tmp_path / name).write_bytes(b"\0\0\0 ftypheic" + bytes(20))
    (tmp_path / "README").write_text("no image")
    (tmp_path / "notes.md").write_text("no image")
    (shard,) = open_images(str(tmp_path))
    read, named = [], []
    with Handles() as handles:
        for i in range(len(shard)):
            try:
                decode_image(shard.image(i, handles))
                read.append(shard.key(i))
            except ImageError:
                named.append(shard.key(i))
    assert len(read) == 12
    assert named == ["k.heic", "l.avif", "m.svg", "n.psd"]


def test_linked_folders_are_followed_and_a_ring_of_links_ends(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/0.png").write_bytes(image_bytes())
    (tmp_path / "set/cat").mkdir(parents=True)
    (tmp_path / "set/cat/0.png").write_bytes(image_bytes())
    (tmp_path / "set/dog").symlink_to(tmp_path / "far")
    (tmp_path / "set/cat/ring").symlink_to(tmp_path / "set")
    assert read(str(tmp_path / "set")) == [["cat"], ["dog"]]


@pytest.mark.parametrize(
    "names",
    [
        ["train/cat/0", "val/cat/0"],
        ["train/cat/0", "train/dog/0"],
        ["train/0", "test/0"],
        ["Train2017/0", "val2017/0"],
        ["training_set/cats/0", "test_set/cats/0"],
        ["train/cat/0", "other/0"],
    ],
)
def test_splits_are_not_classes(tmp_path, names):
    for name in names:
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes())
    with pytest.raises(UserError, match="splits of a set"):
        open_shards(expand(str(tmp_path)))
    assert len(open_images(str(tmp_path))[0]) == len(names)


def test_a_train_among_vehicles_is_a_class(tmp_path):
    for name in ("car", "plane", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(image_bytes())
    assert read(str(tmp_path)) == [["car"], ["plane"], ["train"]]


def test_what_a_folder_is_not_read_as_is_told(tmp_path, capsys):
    members = [("0.png", image_bytes()), ("0.txt", b"a")]
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "0.parquet").write_bytes(b"of img2dataset")
    expand(str(tmp_path))
    assert capsys.readouterr().err == ""
    (tmp_path / "x.png").write_bytes(image_bytes())
    (tmp_path / "more.parquet").write_bytes(b"")
    expand(str(tmp_path))
    error = capsys.readouterr().err
    assert "read as its 1 .tar files; 2 others are passed over, the first more.parquet" in error


def test_captions_without_an_image_are_told(folder, capsys):
    (folder / "img/0.txt").write_text("a")
    (folder / "img/9.txt").write_text("lost")
    assert read(str(folder / "img"))[0] == ["a"]
    assert "1 .txt files have no image beside them: 9.txt" in capsys.readouterr().err


def test_tables_are_told_what_is_wrong_with_them(folder, capsys):
    (folder / "two.csv").write_text("filepath,title,title\nimg/0.png,a,b\n")
    (folder / "wide.csv").write_bytes("filepath,title\nimg/0.png,a\n".encode("utf-16"))
    (folder / "x.json").write_text('[{"file_name": "img/0.png", "text": "a"}]')
    for name, message in (
        ("two.csv", "two columns of the name 'title'"),
        ("wide.csv", "is UTF-16 text: save it as UTF-8"),
        ("x.json", "is one JSON value: write a .jsonl"),
    ):
        with pytest.raises(UserError, match=message):
            open_shards(expand(str(folder / name)))
    assert capsys.readouterr().err == ""
    lists = write_csv(folder / "l.csv", [("filepath", "title"), ("img/0.png", "['a', 'b']")])
    assert read(lists) == [["['a', 'b']"]]
    assert "look like lists written as text" in capsys.readouterr().err


def test_files_that_were_not_fetched_are_told(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("a.tar", "a.parquet", "a.csv", "a.tfrecord", "a.array_record"):
        (folder / name).write_text(pointer)
        with pytest.raises(UserError, match=f"{name} is a pointer of Git LFS"):
            open_shards([str(folder / name)])
    (folder / "img/0.png").write_text(pointer)
    (shard,) = open_images(str(folder / "img"))
    with Handles() as handles, pytest.raises(ImageError, match="a pointer of Git LFS"):
        decode_image(shard.image(0, handles))
    (folder / "z.tfrecord").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match="compressed with gzip: unpack it"):
        open_shards([str(folder / "z.tfrecord")])


def test_images_that_are_passed_over_are_told(folder, capsys):
    write_csv(folder / "img/metadata.csv", [("file_name", "text"), ("1.png", "a"), ("2.png", "b")])
    assert read(str(folder / "img")) == [["a"], ["b"]]
    assert "does not list 3 images of its folder, which are passed over, the first 0.png" in (
        capsys.readouterr().err
    )
    members = [("0.png", image_bytes()), ("0.jpg", image_bytes(fmt="JPEG")), ("0.txt", b"a")]
    write_tar(folder / "t.tar", members)
    webdataset._SEVERAL_IMAGES.clear()
    assert read(str(folder / "t.tar")) == [["a"]]
    assert "t.tar: 1 samples have a .jpg and a .png; only the first" in capsys.readouterr().err


def test_classes_that_are_perhaps_others_are_told(folder, capsys):
    for name in ("a/x/0", "c/1"):
        (folder / f"set/{name}.png").parent.mkdir(parents=True)
        (folder / f"set/{name}.png").write_bytes(image_bytes())
    (folder / "set/b").mkdir()
    assert read(str(folder / "set")) == [["a"], ["c"]]
    error = capsys.readouterr().err
    assert "the outer folder is an image's class, 'a' of a/x/0.png" in error
    assert "1 folders hold no image and are no class: b" in error


def test_a_folder_of_folders_of_shards_is_told(folder):
    (folder / "set/0").mkdir(parents=True)
    write_tar(folder / "set/0/0.tar", [("0.png", image_bytes())])
    with pytest.raises(UserError, match=r"name the folder of the shards, such as .*set/0"):
        expand(str(folder / "set"))


def test_captions_in_lists_are_all_read_or_the_sample_is_named():
    assert caption_values([["a", ["b"]], "c\nd", None]) == ["a", "b", "c d"]
    with pytest.raises(BadSampleError, match="one of 2 captions is no text"):
        caption_values(["a", {"text": "b"}])
    assert caption_lines("\ufeffa\nb".encode()) == ["a", "b"]


def bad_sources(path):
    """Return sources without a sample, and what each must say."""
    (path / "semi.csv").write_text("filepath;title\nimg/0.png;a\n")
    (path / "spaces.csv").write_text("filepath, title\nimg/0.png, a\n")
    pq.write_table(pa.table({"URL": ["u"], "TEXT": ["t"]}), path / "laion.parquet")
    tar = write_tar(path / "whole.tar", [("0.png", image_bytes()), ("0.txt", b"a")])
    data = Path(tar).read_bytes()
    (path / "noend.tar").write_bytes(data[:2048])
    (path / "concat.tar").write_bytes(data + data)
    (path / "zero.tar").write_bytes(b"")
    (path / "broken.parquet").write_bytes(b"PAR1")
    return {
        "semi.csv": "no column for the (image|caption)",
        "spaces.csv": "no column for the caption.*#caption=",
        "laion.parquet": "no column for the image.*#image=",
        "noend.tar": "cut or damaged at byte",
        "concat.tar": "cut or damaged at byte",
        "zero.tar": "cut or damaged at byte",
        "img": "0.png has no caption: put 0.txt beside it",
        "broken.parquet": "cannot be read",
    }


def test_the_reason_of_no_sample_is_told(folder):
    for name, message in bad_sources(folder).items():
        with pytest.raises(UserError, match=message):
            open_all_shards([str(folder / name)], log=SkipLog())
    with pytest.raises(UserError, match="and 1 more shards cannot be read"):
        sources = [str(folder / "noend.tar"), str(folder / "zero.tar")]
        open_all_shards(sources, log=SkipLog())


def test_of_every_source_the_read_and_the_named_are_all_there_is(folder):
    rows = [(f"img/{k}.png", f"caption {k}", "word") for k in range(5)]
    rows += [("img/none.png", "no file", "7"), ("img/0.png", "", ""), ("", "no path", "x")]
    names = ("filepath", "title", "label")
    columns = {
        name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    sources = {
        "csv": write_csv(folder / "t.csv", [names, *rows]),
        "tsv": write_csv(folder / "t.tsv", [names, *rows], "\t"),
    }
    (folder / "t.jsonl").write_text(
        "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n{\n"
    )
    sources["jsonl"] = str(folder / "t.jsonl")
    pq.write_table(pa.table(columns), folder / "t.parquet")
    sources["parquet"] = str(folder / "t.parquet")
    images = [image_bytes()] * 5 + [None, image_bytes(), b"junk"]
    pq.write_table(
        pa.table({"image": images, "text": columns["title"], "label": columns["label"]}),
        folder / "b.parquet",
    )
    sources["parquet of bytes"] = str(folder / "b.parquet")
    members = []
    for k, (path, title, label) in enumerate(rows):
        if k not in (5, 7):
            members.append((f"{k}.png", (folder / path).read_bytes()))
        members += [(f"{k}.txt", title.encode()), (f"{k}.cls", label.encode())]
    sources["tar"] = write_tar(folder / "t.tar", [*members, ("9.heic", b"x"), ("9.txt", b"x")])
    expected = dict.fromkeys(sources, (5, 3)) | {"jsonl": (5, 4), "tar": (5, 4)}
    for name, source in sources.items():
        counts = counts_of(source)
        assert (counts.samples - counts.bad.total(), counts.bad.total()) == expected[name], name
        assert len(counts.bad_samples) == counts.bad.total()


class Text:
    """A feature of a TFDS set, known by its type's name."""


def record_sources(path):
    """Write seven good records and three bad ones in every form of records; return the sources."""
    from array_record.python import array_record_module
    from format_cases import example

    from clip_jax.data.formats import records
    from clip_jax.data.formats.options import Options
    from clip_jax.data.formats.tfds import TfdsShard

    good = [{"image": image_bytes(), "caption": f"a {k}".encode(), "label": k} for k in range(5)]
    good += [good[0] | {"caption": b"the same image"}, good[1] | {"label": b"a word"}]
    bad = [good[0] | {"image": b"junk"}, good[6] | {"caption": b" "}, {"caption": b"no image"}]
    rows = [example(row) for row in good + bad]
    with open(path / "t.tfrecord", "wb") as file:
        for data in rows:
            head = struct.pack("<Q", len(data))
            file.write(head + struct.pack("<I", records.masked_crc(head)))
            file.write(data + struct.pack("<I", records.masked_crc(data)))
    writer = array_record_module.ArrayRecordWriter(str(path / "t.array_record"), "group_size:1")
    for data in rows:
        writer.write(data)
    writer.close()
    examples = [{"image": None} | row for row in good + bad]
    tfds = TfdsShard("tfds:x", examples, {"image": None, "caption": Text()}, 1, Options())
    return [*open_shards([str(path / "t.tfrecord"), str(path / "t.array_record")]), tfds]


def test_of_every_form_of_records_the_read_and_the_named_are_all_there_is(tmp_path):
    for shard in record_sources(tmp_path):
        counts = counts_of_shards([shard])
        assert not counts.other_fields["image"]
        assert (counts.samples, counts.bad.total(), len(counts.bad_samples)) == (10, 3, 3)
        with Handles() as handles:
            ids = [shard.image_id(i, handles) for i in (0, 5, 1)]
        # Records of one image are one image in retrieval.
        assert ids[0] == ids[1] and hash_image(image_bytes()) == ids[0]


@pytest.mark.parametrize("classes", [True, False])
def test_of_a_folder_the_read_and_the_named_are_all_there_is(tmp_path, classes, capsys):
    for k in range(4):
        path = tmp_path / (f"class {k % 2}/{k}.png" if classes else f"part {k % 2}/{k}.png")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes() if k else b"\x89PNG\r\n\x1a\n junk")
        if not classes:
            path.with_suffix(".txt").write_text("" if k == 1 else "a caption")
    (tmp_path / path.parent / "x.heic").write_bytes(b"x")
    (tmp_path / path.parent / "x.dat").write_bytes(b"no image by name or content")
    counts = counts_of(str(tmp_path))
    assert counts.samples == 5
    assert counts.bad.total() == len(counts.bad_samples) == (2 if classes else 3)


def test_what_is_read_is_written_and_read_again(folder):
    table = write_csv(folder / "t.csv", [("filepath", "title", "label"), ("img/0.png", LINES, "w")])
    (shard,) = open_shards(expand(table))
    with Handles() as handles:
        sample = read_sample(shard, 0, handles)
    assert (sample.captions, sample.label) == ([ONE], -1)
    from clip_jax.data.writing.tar_writer import write_shard

    write_shard(folder / "w.tar", [sample])
    assert read(str(folder / "w.tar")) == [[ONE]]
