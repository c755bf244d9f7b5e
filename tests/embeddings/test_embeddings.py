"""Tests of embedding folders: their layout, what is skipped, and that a kill leaves no trace."""

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from data_cases import encode, make_image, write_shards
from embedded import SIDE, toy_encoders, toy_info, write_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from pairs import write_data
from run_tiny import ROOT, environment

from clip_jax import api
from clip_jax.data.images import eval_transform
from clip_jax.embeddings.folder import begin_folder, open_embeddings, part_path, read_info
from clip_jax.embeddings.score import read_features
from clip_jax.embeddings.write import (
    consecutive_runs,
    embed,
    finish_folder,
    open_images,
    parts_of_process,
)
from clip_jax.errors import UserError
from clip_jax.evaluation.multilabel import average_precisions
from clip_jax.tools import embed as command
from clip_jax.tools import evaluate

FLOAT16_ERROR = 2**-12
"""Half a unit in the last place of float16 below 1, which unit rows are rounded by."""


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def damage(folder: Path) -> None:
    """Add a shard with two samples that cannot be used and one without a caption."""
    with webdataset.TarWriter(str(folder / "s-00009.tar")) as writer:
        writer.write({"__key__": "x0", "png": b"no image", "txt": "broken"})
        writer.write({"__key__": "x1", "png": encode(make_image("RGB", 15, 12), "PNG")})
        writer.write({"__key__": "x2", "txt": "no image at all"})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    write_shards(folder, [30, 23], side=SIDE)
    damage(folder)
    return str(folder)


def make(data, folder, *, after=None, **process):
    info = toy_info(data)
    begin_folder(folder, info)
    encoders = toy_encoders(after=after)
    return embed(encoders, open_images(data), info, folder, progress=False, **process)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert make(data, folder) == [0, 1, 2, 3]
    info = toy_info(data)
    assert info.samples - finish_folder(folder, info).total() == 54
    return folder


def test_rows_are_the_encoders_and_the_metadata_names_them(data, finished):
    encoders, shards = toy_encoders(), open_images(data)
    images, texts = open_embeddings(finished), open_embeddings(finished, "text")
    assert [p.name for p in images.paths] == [f"img_emb_{i}.npy" for i in range(4)]
    assert images.parts[0].dtype == np.float16 and len(images) == len(texts) == 54
    assert len(files(finished)) == 4 * 4 + 2
    z_image, z_text = images.rows(np.arange(54)), texts.rows(np.arange(54))
    for row in (0, 15, 16, 29, 30, 52):
        metadata = images.metadata(row)
        assert metadata["row"] == row and metadata["caption"] == f"caption {row}"
        shard = "s-00000.tar" if row < 30 else "s-00001.tar"
        assert metadata["image_path"] == f"{shard}/{metadata['key']}" == f"{shard}/{row:06d}"
        pixels = eval_transform(make_image("RGB", SIDE, SIDE + 3, seed=row), SIDE)
        for stored, z in (
            (z_image[row], encoders.encode_image(pixels[None])[0]),
            (z_text[row], encoders.encode_text(encoders.tokenizer([metadata["caption"]], 16))[0]),
        ):
            np.testing.assert_allclose(stored, z / np.linalg.norm(z), atol=FLOAT16_ERROR)
    # The one without a caption has the features of an empty text, as an empty file would have.
    assert images.metadata(53)["caption"] == "" and images.metadata(53)["row"] == 54
    assert sum(map(len, shards)) == 56


def test_what_cannot_be_used_is_listed_with_its_cause(finished):
    lines = [json.loads(line) for line in (finished / "skipped.jsonl").read_text().splitlines()]
    assert [(line["cause"], line["name"]) for line in lines] == [
        ("not_an_image", "s-00009.tar/x0"),
        ("no_image", "s-00009.tar/x2"),
    ]


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(data, finished, tmp_path, after):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(data, folder, after=after)
    # A killed process may leave what it was writing.
    torn = part_path(folder, "img_emb", after // 2, 4)
    torn.parent.mkdir(exist_ok=True)
    torn.with_name(torn.name + ".partial").write_bytes(b"half")
    assert finish_folder(folder, toy_info(data)) is None
    with pytest.raises(UserError, match=r"is not finished|holds no img_emb"):
        open_embeddings(folder)
    assert make(data, folder) == list(range(after // 2, 4))
    finish_folder(folder, toy_info(data))
    assert files(folder) == files(finished)


def test_damaged_and_missing_files_of_a_part_are_made_again(data, finished, tmp_path):
    folder = tmp_path / "out"
    make(data, folder)
    part_path(folder, "img_emb", 1, 4).write_bytes(
        part_path(finished, "img_emb", 1, 4).read_bytes()[:99]
    )
    part_path(folder, "metadata", 3, 4).unlink()
    with pytest.raises(UserError, match="2 of 4 parts are complete"):
        open_embeddings(folder)
    assert make(data, folder) == [1, 3]
    finish_folder(folder, toy_info(data))
    assert files(folder) == files(finished)


def test_processes_make_parts_of_their_own_and_the_last_one_finishes(data, finished, tmp_path):
    folder = tmp_path / "out"
    numbers = []
    for index in (2, 0, 1):
        assert finish_folder(folder, toy_info(data)) is None
        numbers += make(data, folder, process_index=index, process_count=3)
    assert sorted(numbers) == [0, 1, 2, 3]
    finish_folder(folder, toy_info(data))
    assert files(folder) == files(finished)


@given(st.integers(0, 60), st.integers(1, 20))
def test_parts_are_shared_out_once_and_evenly(parts, count):
    shares = [parts_of_process(parts, index, count) for index in range(count)]
    assert [n for share in shares for n in share] == list(range(parts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.sets(st.integers(0, 40)))
def test_consecutive_runs_have_gaps_between_them(numbers):
    runs = consecutive_runs(sorted(numbers))
    assert [n for run in runs for n in run] == sorted(numbers)
    assert all(a.stop < b.start for a, b in itertools.pairwise(runs))


def test_another_model_or_source_is_refused_by_name(data, finished, tmp_path):
    begin_folder(finished, toy_info(data, model="moved"))
    with pytest.raises(UserError, match=r"begun with another identity \(a, now b\)"):
        begin_folder(finished, toy_info(data, identity="b"))
    with pytest.raises(UserError, match=r"begun with another part_rows \(16, now 32\)"):
        begin_folder(finished, toy_info(data, part_rows=32))
    (tmp_path / "img_emb").mkdir()
    with pytest.raises(UserError, match="holds something else"):
        begin_folder(tmp_path, toy_info(data))
    (tmp_path / "embedding.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_info(tmp_path)


def test_a_folder_of_an_earlier_version_goes_on(data, finished, tmp_path):
    """Its file has other white space, and lacks what came later."""
    folder = tmp_path / "out"
    folder.mkdir()
    info = {k: v for k, v in dataclasses.asdict(toy_info(data)).items() if k != "texts"}
    (folder / "embedding.json").write_text(json.dumps(info, indent=2) + "\n")
    assert make(data, folder) == [0, 1, 2, 3] and finish_folder(folder, toy_info(data))
    resumed, expected = files(folder), files(finished)
    assert resumed.pop("embedding.json") != expected.pop("embedding.json")
    assert resumed == expected


def test_numbers_have_the_digits_of_clip_retrieval():
    names = [part_path(Path(), "metadata", 3, parts).name for parts in (1, 9, 10, 99, 100)]
    assert names == [f"metadata_{n}.parquet" for n in ("3", "3", "03", "03", "003")]


@pytest.mark.parametrize("wrong", ["2", "2/2", "-1/2", "a/b", "1/0"])
def test_a_wrong_place_among_processes_is_one_line(wrong):
    with pytest.raises(UserError, match="is not I/N"):
        command.process_place(wrong)


def test_the_place_comes_from_the_flag_or_the_cluster(monkeypatch):
    assert command.process_place(None) == (0, 1)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    for name, value in {"PROCID": 2, "NTASKS": 3, "LOCALID": 0, "STEP_NUM_NODES": 3}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "a,b,c")
    assert command.process_place(None) == (2, 3)
    assert command.process_place("1/8") == (1, 8)


def test_images_alone_in_a_folder_are_embedded(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(make_image("RGB", 14, 14, seed=i), "PNG"))
    info = toy_info(str(tmp_path), texts=False)
    out = tmp_path / "out"
    embed(toy_encoders(), open_images(str(tmp_path)), info, out, progress=False)
    table = pq.read_table(out / "metadata/metadata_0.parquet")
    assert table["key"].to_pylist() == ["0.png", "1.png", "2.png"]
    assert not (out / "text_emb").exists()


def run_command(data: str, model: Path, out: Path) -> list[str]:
    line = [sys.executable, "-m", "clip_jax.embed", "--model", str(model), "--data", data]
    return [*line, "--out", str(out), "--batch-size", "16", "--part-size", "48"]


@pytest.mark.slow
def test_the_command_killed_three_times_leaves_the_same_bytes(tmp_path):
    folder, pattern = write_data(tmp_path / "data", shards=8, samples=300)
    model = write_tiny_model(tmp_path / "model", folder / "t.model")

    def start(out):
        return subprocess.Popen(
            run_command(pattern, model, out),
            cwd=ROOT,
            env=environment(8),
            stderr=subprocess.DEVNULL,
        )

    assert start(tmp_path / "finished").wait() == 0
    assert len(list((tmp_path / "finished/metadata").iterdir())) == 50
    killed = tmp_path / "killed"
    for parts in (4, 17, 31):
        process = start(killed)
        while len(list(killed.glob("metadata/*.parquet"))) < parts:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert not (killed / "skipped.jsonl").exists()
    assert start(killed).wait() == 0
    assert {n: b for n, b in files(killed).items() if "partial" not in n} == files(
        tmp_path / "finished"
    )


def test_embedded_features_are_evaluated_without_their_images(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    write_shards(data, [30, 23], side=SIDE)
    for name in ("test", "train"):
        info = toy_info(str(data))
        begin_folder(tmp_path / name, info)
        embed(toy_encoders(), open_images(str(data)), info, tmp_path / name, progress=False)
        finish_folder(tmp_path / name, info)
    monkeypatch.setattr(api, "load_encoders", lambda model, **options: toy_encoders())
    names = [f"name {i}" for i in range(7)]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    encoders = toy_encoders()
    tokens = encoders.tokenizer(names, 16)
    np.save(tmp_path / "classes.npy", encoders.encode_text(tokens))
    z = read_features(tmp_path / "test").z_image_BD
    labels = np.arange(53) % 7

    def run(*flags):
        out = tmp_path / "out"
        flags = ["--embeddings", str(tmp_path / "test"), "--out", str(out), *map(str, flags)]
        assert evaluate.main(flags) == 0
        return json.loads((out / "eval.json").read_text())["results"]

    classes = encoders.encode_text(tokens)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    by_names = run("--classnames", tmp_path / "names.txt", "--template", "{}")
    by_features = run("--class-embeddings", tmp_path / "classes.npy")
    want = ((z @ classes.T).argmax(axis=1) == labels).mean()
    for (result,) in (by_names, by_features):
        assert result["metrics"]["acc1"] == pytest.approx(want)
    (pairs,) = run()
    assert pairs["task"] == "zeroshot_retrieval" and pairs["images"] == 53
    (near,) = run("--task", "knn", "--train-embeddings", tmp_path / "train", "--neighbors", 1)
    assert near["metrics"]["knn_acc1"] == 1
    several = rng.integers(0, 2, (53, 7))
    np.save(tmp_path / "labels.npy", several)
    flags = ("--class-embeddings", tmp_path / "classes.npy", "--labels")
    (many,) = run(*flags, tmp_path / "labels.npy")
    want = average_precisions(z @ classes.T, several != 0).mean()
    assert many["metrics"] == pytest.approx({"mean_average_precision": want})
    (tmp_path / "few.txt").write_text("1\n2\n")
    with pytest.raises(UserError, match="holds 53 images, and there are 2 labels"):
        run(*flags, tmp_path / "few.txt")
    with pytest.raises(UserError, match="learns from labeled images; give --train-embeddings"):
        run("--task", "knn")
