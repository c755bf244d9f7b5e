"""Data as people have it: a folder's own classes, and tables with a row for each caption."""

import csv
import io
import json
import tarfile
import types

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from data_cases import ToyTokenizer
from format_cases import example
from jax.sharding import Mesh
from PIL import Image
from test_tasks import SIDE, spec_of, toy_encoders
from tiny import VIT

from clip_jax.data.images import OPENAI
from clip_jax.data.shards import Handles
from clip_jax.data.sources import open_shards
from clip_jax.errors import UserError
from clip_jax.evaluation.in_training import make_evaluator
from clip_jax.evaluation.run import may_name_classes, run_evaluation, source_class_names
from clip_jax.pretrained import work_folder
from clip_jax.tools.evaluate import workdir_spec

RETRIEVAL, ZERO_SHOT = "zeroshot_retrieval", "zeroshot_classification"


def png(seed):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_classes(folder, names, images=2):
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(images):
            (folder / name / f"{i}.png").write_bytes(png(10 * k + i))
    return folder


def run(tmp_path, data, *tasks, **changes):
    spec = spec_of(data, tasks=tasks, batch_size=8, **changes)
    return run_evaluation(toy_encoders(), spec, folder=tmp_path / "out", progress=False)


def written(tmp_path):
    return json.loads((tmp_path / "out" / "eval.json").read_text())


def test_a_class_folder_is_scored_by_its_own_names(tmp_path, monkeypatch):
    data = write_classes(tmp_path / "set", ["box", "red_disc", "tri"])
    run(tmp_path, data, ZERO_SHOT)
    assert written(tmp_path)["class_names"] == ["box", "red disc", "tri"]
    (tmp_path / "names.txt").write_text("".join(f"name {i}\n" for i in range(50)))
    with pytest.raises(UserError, match=r"holds 50 class names, and .* has 3 classes"):
        run(tmp_path, data, ZERO_SHOT, classnames=str(tmp_path / "names.txt"))
    config = {"eval": {"data": "its.tar", "classnames": str(tmp_path / "names.txt")}}
    description = types.SimpleNamespace(config=config)
    monkeypatch.setattr(work_folder, "read_description", lambda workdir: description)
    assert workdir_spec("runs/x", data=str(data)).classnames == ""
    assert workdir_spec("runs/x").classnames == str(tmp_path / "names.txt")
    assert workdir_spec("runs/x", data=str(data), classnames="pets").classnames == "pets"


def test_names_of_a_folder_in_another_order_are_refused(tmp_path):
    data = write_classes(tmp_path / "set", ["box", "disc"])
    (tmp_path / "names.txt").write_text("disc\nbox\n")
    with pytest.raises(UserError, match=r"in another order.*its order is box, disc"):
        run(tmp_path, data, ZERO_SHOT, classnames=str(tmp_path / "names.txt"))


def test_a_runs_names_for_other_data_are_told(tmp_path, monkeypatch, capsys):
    description = types.SimpleNamespace(config={"eval": {"data": "a.tar", "classnames": "n.txt"}})
    monkeypatch.setattr(work_folder, "read_description", lambda workdir: description)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
    assert workdir_spec("runs/x", data=str(tmp_path / "b.tar")).classnames == "n.txt"
    assert "class names are those of the run, n.txt" in capsys.readouterr().err


def test_labels_of_other_classes_are_not_compared(tmp_path):
    test = write_classes(tmp_path / "test", ["box", "disc"])
    train = write_classes(tmp_path / "train_set", ["ball", "box", "disc"])
    with pytest.raises(UserError, match=r"have other classes.*ball"):
        run(tmp_path, test, "knn", train_data=str(train))
    with pytest.raises(UserError, match="have other classes, so a label means another"):
        source_class_names(f"{test}::{train}")


def test_classes_of_a_hugging_face_table_have_their_names(tmp_path):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table({"image": [png(0), png(1)], "text": ["a", "b"], "label": [0, 1]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "t.parquet")
    assert source_class_names(str(tmp_path / "t.parquet")) == ["cat", "dog"]
    # Without a column of captions, the names are the captions.
    named = table.select(["image", "label"]).replace_schema_metadata(metadata)
    pq.write_table(named, tmp_path / "images.parquet")
    run(tmp_path, tmp_path / "images.parquet", ZERO_SHOT)
    assert written(tmp_path)["class_names"] == ["cat", "dog"]
    (shard,) = open_shards([str(tmp_path / "images.parquet")])
    with Handles() as handles:
        assert [shard.captions(i, handles) for i in range(2)] == [["cat"], ["dog"]]
    pq.write_table(table, tmp_path / "u.parquet")
    assert source_class_names(str(tmp_path / "u.parquet")) == []


def test_rows_of_one_image_are_its_captions(tmp_path, capsys):
    captions = [[f"caption {k} of {i}" for k in range(5)] for i in range(5)]
    with tarfile.open(tmp_path / "lines.tar", "w") as tar:
        for i, lines in enumerate(captions):
            (tmp_path / f"{i}.png").write_bytes(png(i))
            for suffix, data in (("png", png(i)), ("txt", "\n".join(lines).encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (expected,) = run(tmp_path, tmp_path / "lines.tar", RETRIEVAL).results
    # The rows of an image need not lie together, nor spell its path alike.
    rows = [("./" * (k == 3) + f"{i}.png", captions[i][k]) for k in range(5) for i in range(5)]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    lines = [json.dumps({"file_name": path, "text": text}) for path, text in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    paths, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"path": paths, "text": texts}), tmp_path / "paths.parquet")
    images = [(tmp_path / path).read_bytes() for path in paths]
    pq.write_table(pa.table({"image": images, "text": texts}), tmp_path / "bytes.parquet")
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "t.array_record"), "group_size:1")
    for image, text in zip(images, texts, strict=True):
        writer.write(example({"image": image, "caption": text.encode()}))
    writer.close()
    names = ["t.csv", "t.jsonl", "paths.parquet", "bytes.parquet", "t.array_record"]
    for name in [*names, "t.csv#template={}"]:
        (result,) = run(tmp_path, f"{tmp_path}/{name}", RETRIEVAL).results
        assert result["images"] == expected["images"] == 5
        assert result["metrics"] == pytest.approx(expected["metrics"])
    assert "25 rows are 5 images with several captions" in capsys.readouterr().err


def test_samples_of_a_tar_that_look_like_one_image_are_told(tmp_path, capsys):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for i, seed in enumerate((0, 1, 0, 0)):
            for suffix, data in (("png", png(seed)), ("txt", b"caption %d" % i)):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (result,) = run(tmp_path, tmp_path / "t.tar", RETRIEVAL).results
    assert result["images"] == 4
    assert "2 of 4 images have the very features of another" in capsys.readouterr().err


def make_in_training(data, **changes):
    spec = spec_of(data, tasks=(ZERO_SHOT,), batch_size=8, **changes)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    return make_evaluator(
        lambda variables, rows: rows,
        lambda variables, rows: rows,
        spec,
        mesh,
        config=VIT,
        tokenizer=ToyTokenizer(),
        preprocess=OPENAI,
        scale=lambda variables: 1.0,
    )


def test_in_training_a_folders_own_names_are_taken(tmp_path):
    data = write_classes(tmp_path / "set", ["box", "disc"])
    assert may_name_classes(f"{data}") and may_name_classes("x.parquet#label=y::tfds:coco")
    assert not may_name_classes("x.tar") and not may_name_classes(f"{data}::x.csv")
    assert callable(make_in_training(data))
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    (pairs / "0.png").write_bytes(png(0))
    (pairs / "0.txt").write_text("a caption")
    with pytest.raises(
        UserError, match=r"has no class names of its own and config\.eval.classnames"
    ):
        make_in_training(pairs)


def test_why_nothing_was_scored_is_told(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "t.csv").write_text("filepath,title,label\n0.png,a,cat\n")
    (tmp_path / "n.txt").write_text("cat\ndog\n")
    with pytest.raises(
        UserError, match="nothing for zeroshot_classification: no image has a class"
    ):
        run(tmp_path, tmp_path / "t.csv", ZERO_SHOT, classnames=str(tmp_path / "n.txt"))
    (tmp_path / "u.csv").write_text("filepath,title\nnone.png,a\n")
    with pytest.raises(UserError, match=r"nothing to evaluate \(1 read_failed\).*inspect"):
        run(tmp_path, tmp_path / "u.csv", RETRIEVAL)
