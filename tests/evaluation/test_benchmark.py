"""Test data sets in CLIP_benchmark's layout, their figures, and many models on many of them."""

import csv
import dataclasses
import json
import shutil

import fsspec
import jax
import numpy as np
import pytest
from benchmark_trees import NAMES, TEMPLATES, crepe_texts, png, write_choices, write_tree
from data_cases import write_shards
from embedded import toy_encoders
from fake_cluster import FakeCluster
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax import api
from clip_jax.data.sources import expand, open_shards
from clip_jax.errors import UserError
from clip_jax.evaluation.benchmark_folder import describe_source, find_benchmark_folder
from clip_jax.evaluation.cells import make_spec
from clip_jax.evaluation.datasets import (
    COLLECTIONS,
    DATACOMP_GROUPS,
    DATASETS,
    aggregates,
    known_dataset,
)
from clip_jax.evaluation.encoders import encode_padded
from clip_jax.evaluation.groups import GROUP_SCORES, macro_scores
from clip_jax.evaluation.multilabel import average_precisions
from clip_jax.evaluation.run import run_evaluation
from clip_jax.evaluation.spec import EvalSpec
from clip_jax.evaluation.zero_shot import class_embeddings
from clip_jax.sections import EvalSection
from clip_jax.tools import benchmark

SPLITS = {"split": "test", "train_split": "train", "val_split": ""}


def evaluate(source, folder, **changes):
    fields = describe_source({"data": str(source)} | changes, **SPLITS)
    spec = EvalSpec.from_section(EvalSection(batch_size=8), **fields)
    return run_evaluation(toy_encoders(), spec, folder=folder, progress=False)


def raw(root, member):
    """Read one member of every sample of the test split, in the shards' order."""
    shards = open_shards(expand(find_benchmark_folder(str(root), "test").data))
    from clip_jax.data.shards import Handles

    with Handles() as handles:
        return [getattr(s, member)(i, handles) for s in shards for i in range(len(s))]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_average_precision_is_the_mean_of_precisions_at_the_right_ranks(count, classes, seed):
    rng = np.random.default_rng(seed)
    score, positive = rng.normal(size=(count, classes)), rng.random((count, classes)) < 0.4
    for m, got in enumerate(average_precisions(score, positive)):
        order = sorted(range(count), key=lambda i: -score[i, m])
        precisions = [
            sum(positive[i, m] for i in order[: rank + 1]) / (rank + 1)
            for rank in range(count)
            if positive[order[rank], m]
        ]
        assert got == pytest.approx(sum(precisions) / max(1, len(precisions)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_macro_scores_are_means_over_the_classes_that_have_images(pairs):
    guess, label = (np.array(column) for column in zip(*pairs, strict=True))
    recalls, f1s = [], []
    for m in sorted(set(label.tolist())):
        hits = int(((guess == m) & (label == m)).sum())
        recalls.append(hits / (label == m).sum())
        f1s.append(2 * hits / ((label == m).sum() + (guess == m).sum()))
    assert macro_scores(guess, label) == pytest.approx((np.mean(recalls), np.mean(f1s)))


def test_a_folder_of_the_layout_is_found_by_its_root_its_split_or_braces(tmp_path):
    root = write_tree(tmp_path / "wds_cars_test")
    write_tree(root, split="train")
    found = find_benchmark_folder(str(root), "test")
    assert (found.name, found.shards, found.kind) == ("cars", 3, "classification")
    assert find_benchmark_folder(str(root / "test"), "train") == found
    assert find_benchmark_folder(f"{root}/{{}}", "test") == found
    assert find_benchmark_folder(str(root), "train").data == f"{root}/train/{{0..2}}.tar"
    assert find_benchmark_folder(str(tmp_path), "test") is None
    for source in (str(root), f"{root}/{{}}"):
        with pytest.raises(UserError, match=r"no split 'val' .*test, train"):
            find_benchmark_folder(source, "val")
    (root / "dataset_type.txt").write_text("odd")
    with pytest.raises(UserError, match=r"dataset_type.txt holds 'odd'"):
        find_benchmark_folder(str(root), "test")
    (root / "test" / "nshards.txt").write_text("many")
    with pytest.raises(UserError, match=r"nshards.txt holds 'many'"):
        find_benchmark_folder(str(root), "test")


def test_a_remote_folder_is_as_a_local_one(tmp_path):
    local = write_tree(tmp_path / "wds_many_test", "multilabel")
    bucket = fsspec.filesystem("memory")
    bucket.put(str(local), "/trees/wds_many_test", recursive=True)
    found = find_benchmark_folder("memory://trees/wds_many_test/", "test")
    assert (found.name, found.kind, found.shards) == ("many", "multilabel", 3)
    assert find_benchmark_folder("memory://trees/wds_many_test", "val") is None
    assert find_benchmark_folder("memory://trees/{0..3}.tar", "val") is None
    (want,) = evaluate(local, tmp_path / "a").results
    (got,) = evaluate("memory://trees/wds_many_test", tmp_path / "b").results
    assert got == want


def test_a_missing_shard_is_an_error(tmp_path):
    root = write_tree(tmp_path / "cars")
    (root / "test" / "1.tar").unlink()
    with pytest.raises(UserError, match=r"no file .*1\.tar"):
        evaluate(root, tmp_path / "out")


def test_the_kinds_of_folders_are_scored_by_their_own_tasks(tmp_path):
    (result,) = evaluate(write_tree(tmp_path / "wds_vtab-dtd_test"), tmp_path / "a").results
    assert (result["dataset"], result["task"]) == ("vtab/dtd", "zeroshot_classification")
    encoders = toy_encoders()
    want = class_embeddings(
        encoders.encode_text, encoders.tokenizer, NAMES,
        [t.replace("{c}", "{}") for t in TEMPLATES], batch_size=4, context_length=16,
    )  # fmt: skip
    (saved,) = (tmp_path / "a" / "features").glob("classes-*.npy")
    np.testing.assert_allclose(np.load(saved), want, atol=1e-6)

    root = write_tree(tmp_path / "many", "multilabel")
    (result,) = evaluate(root, tmp_path / "b").results
    assert set(result["metrics"]) == {"mean_average_precision"} and result["images"] == 23
    targets = np.stack(raw(root, "array"))
    (part,) = (tmp_path / "b" / "features").glob("*/part-00000.npz")
    scores = np.load(part)["z_image_BD"] @ want.T
    expected = average_precisions(scores, targets != 0).mean()
    assert result["metrics"]["mean_average_precision"] == pytest.approx(expected, abs=1e-6)

    root = write_tree(tmp_path / "flickr8k", "retrieval")
    (result,) = evaluate(root, tmp_path / "c").results
    assert result["task"] == "zeroshot_retrieval" and "text_retrieval_recall@5" in result["metrics"]


def test_groups_are_scored_by_the_worst_of_them(tmp_path):
    root = write_tree(tmp_path / "wds_wilds-fmow_test", groups=3, images=40)
    evaluation = evaluate(root, tmp_path / "out")
    metrics = evaluation.results[0]["metrics"]
    groups, labels = np.stack(raw(root, "array")), np.array(raw(root, "label"))
    (part,) = (tmp_path / "out" / "features").glob("*/part-00000.npz")
    (classes,) = (tmp_path / "out" / "features").glob("classes-*.npy")
    right = (np.load(part)["z_image_BD"] @ np.load(classes).T).argmax(axis=1) == labels
    for name, column in (("region", 0), ("year", 1)):
        worst = min(right[groups[:, column] == g].mean() for g in range(3))
        assert metrics[f"acc_worst_{name}"] == pytest.approx(worst)
    assert metrics["acc_avg"] == pytest.approx(metrics["acc1"])
    with pytest.raises(UserError, match=r"geode: .* 3 numbers, and not region, country"):
        evaluate(root, tmp_path / "out", scoring="geode")
    for scores in GROUP_SCORES.values():
        top = np.stack([labels, (labels + 1) % 6], axis=1)
        values = scores.score(top, labels, np.zeros((len(labels), len(scores.columns)), int))
        assert all(value == 1 for value in values.values())


def test_probes_learn_from_the_training_split(tmp_path):
    root = write_tree(tmp_path / "cars")
    write_tree(root, split="train", images=40, seed=50)
    tasks = ("knn", "zeroshot_classification")
    results = evaluate(root, tmp_path / "out", tasks=tasks).results
    assert [r["task"] for r in results] == list(tasks)


def test_choices_are_the_definition(tmp_path):
    files = write_choices(tmp_path)
    encoders = toy_encoders()

    def text(caption):
        tokens = encoders.tokenizer([caption], 16)
        return encode_padded(encoders.encode_text, tokens, 1)[0]

    def image(i):
        from clip_jax.data.images import OPENAI, decode_image, eval_transform

        pixels = eval_transform(decode_image(png(100 + i)), 12, OPENAI)
        z = encoders.encode_image(pixels[None])[0]
        return z / np.linalg.norm(z)

    (crepe,) = evaluate(files["sugar_crepe"], tmp_path / "a").results
    assert (crepe["dataset"], crepe["task"]) == ("sugar_crepe/add_att", "image_caption_selection")
    pairs = [map(text, crepe_texts(i)) for i in range(12)]
    right = [image(i) @ a > image(i) @ b for i, (a, b) in enumerate(pairs)]
    metrics = {"image_acc": 1.0, "text_acc": np.mean(right), "acc": np.mean(right)}
    assert crepe["metrics"] == pytest.approx(metrics) and 0 < np.mean(right) < 1

    (pairs,) = evaluate(files["winoground"], tmp_path / "b").results
    scores = [
        np.stack([image(i), image(i + 1)])
        @ np.stack([text(f"a b {i}"), text(f"b a {i} more")]).T
        for i in range(11)
    ]  # fmt: skip
    by_text = [s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0] for s in scores]
    by_image = [s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1] for s in scores]
    both = np.logical_and(by_text, by_image)
    want = {"image_acc": np.mean(by_image), "text_acc": np.mean(by_text), "acc": np.mean(both)}
    assert pairs["metrics"] == pytest.approx(want)

    (cues,) = evaluate(files["winogavil"], tmp_path / "c").results
    z = text("An owl 5")
    nearest = set(sorted(range(5), key=lambda j: -(image((5 + j) % 12) @ z))[:2])
    share = len(nearest & {0, 2}) / len(nearest | {0, 2})
    assert cues["metrics"]["jaccard_score_5"] == pytest.approx(share)

    (tmp_path / "val2017" / "im3.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 12 images, the first im3.jpg, not found in .*#root"):
        evaluate(files["sugar_crepe"], tmp_path / "d")


def test_the_tables_of_data_sets_agree():
    assert len(COLLECTIONS["datacomp"]) == len(set(COLLECTIONS["datacomp"])) == 38
    assert [len(COLLECTIONS[name]) for name in ("vtab", "vtab+", "sugar_crepe")] == [19, 36, 7]
    assert all(name in DATASETS for names in COLLECTIONS.values() for name in names)
    assert known_dataset("wds/vtab/pets").metric == "mean_per_class_recall"
    assert known_dataset("wilds-fmow").metric == "acc_worst_region"
    assert known_dataset("nothing") is None
    values = {name: i / 38 for i, name in enumerate(COLLECTIONS["datacomp"])}
    assert set(aggregates(values)) == set(DATACOMP_GROUPS)
    assert aggregates(values)["Average"] == pytest.approx(np.mean(list(values.values())))
    del values["misc/winogavil"]
    assert set(aggregates(values)) == {"ImageNet", "ImageNet dist. shifts", "VTAB"}


def test_a_known_set_in_another_format_has_the_shipped_names_and_prompts(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "0.png").write_bytes(png(0))
    (tmp_path / "mnist").mkdir()
    write_shards(tmp_path / "mnist", [3])
    options = {"tasks": (), "pretrained": "", "batch_size": 8, "confuse_equal_captions": True}
    specs = [
        make_spec(str(tmp_path / name), dataset=name, **options, **SPLITS)
        for name in ("pets", "mnist")
    ]
    assert [spec.classnames for spec in specs] == ["", "mnist"]
    assert [len(spec.templates) for spec in specs] == [1, 1] and "pet" in specs[0].templates[0]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Two models, and the list of those that were loaded and of the images that were encoded."""
    log = []

    def load(model, *, dtype="float32", **options):
        log.append(model)
        toy = toy_encoders(dim=8 if "a.npz" in model else 12)

        def encode_image(images):
            log.append(len(images))
            if len(log) == stop.get("at"):
                raise KeyboardInterrupt
            return toy.encode_image(images)

        return dataclasses.replace(toy, encode_image=encode_image, identity=model)

    stop = {}
    monkeypatch.setattr(api, "load_encoders", load)
    # What other tests have compiled stays.
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).write_bytes(b"weights")
    return [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")], log, stop


def table(out):
    results = json.loads((out / "results.json").read_text())
    with (out / "results.csv").open(newline="") as file:
        return results, list(csv.DictReader(file))


def test_many_models_on_many_data_sets_go_on_where_they_were_stopped(tmp_path, models, capsys):
    paths, log, stop = models
    write_tree(tmp_path / "wds_cars_test")
    write_tree(tmp_path / "wds_voc2007_multilabel_test", "multilabel")
    files = write_choices(tmp_path / "choices")
    roots = ["cars", "voc2007_multilabel", str(files["sugar_crepe"])]
    argv = ["--model", *paths, "--dataset", *roots, "--batch-size", "8", "--dataset-root",
            f"{tmp_path}/wds_{{dataset_cleaned}}_test"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert benchmark.main([*argv, "--out", str(whole)]) == 0
    want = table(whole)
    assert [row["dataset"] for row in want[1]] == 2 * [
        "cars", "voc2007_multilabel", "sugar_crepe/add_att"
    ]  # fmt: skip
    for row in want[0]["results"]:
        assert row["value"] == row["metrics"][row["figure"]]
    assert want[0]["aggregates"]["a"] == {
        "3 data sets": np.mean([row["value"] for row in want[0]["results"][:3]])
    }
    page = (whole / "results.html").read_text()
    assert "voc2007_multilabel" in page and "<script" not in page
    assert not list(whole.rglob("features"))

    encoded = sum(n for n in log if isinstance(n, int))
    log.clear()
    stop["at"] = len(roots) + 4  # in the second data set of the first model
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*argv, "--out", str(parts)])
    assert len(table(parts)[1]) == 1
    stop.clear()
    before = sum(n for n in log if isinstance(n, int))
    log.clear()
    assert benchmark.main([*argv, "--out", str(parts)]) == 0
    assert "1 of 6 are done already" in capsys.readouterr().out
    assert before + sum(n for n in log if isinstance(n, int)) <= encoded + 24
    assert table(parts) == want

    log.clear()
    assert benchmark.main([*argv, "--out", str(parts)]) == 0
    assert log == [] and table(parts) == want


def test_what_changed_is_evaluated_again_and_a_missing_set_stops_nothing(tmp_path, models):
    paths, log, _ = models
    root = write_tree(tmp_path / "wds_cars_test")
    argv = ["--model", *paths, "--dataset", str(root), "--out", str(tmp_path / "out")]
    assert benchmark.main(argv) == 0
    (tmp_path / "b.npz").write_bytes(b"other weights")
    log.clear()
    assert benchmark.main(argv) == 0
    assert [item for item in log if isinstance(item, str)] == [paths[1]]
    shutil.rmtree(root / "test")
    write_tree(root, images=11, seed=3)
    argv += ["--dataset", str(root), "food101", "--dataset-root", f"{tmp_path}/{{dataset}}"]
    with pytest.raises(UserError, match="2 of 4 could not be evaluated, the first a on food101"):
        benchmark.main(argv)
    results, rows = table(tmp_path / "out")
    assert [(row["label"], row["images"]) for row in rows] == [("a", "11"), ("b", "11")]
    assert "<h1>2 models, 1 data set</h1>" in (tmp_path / "out" / "results.html").read_text()
    assert [item["dataset"] for item in results["failed"]] == ["food101", "food101"]
    with pytest.raises(UserError, match=r"food101 is no file and no folder; .*--dataset-root"):
        benchmark.main(["--model", *paths, "--dataset", "food101", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_a_second_command_keeps_the_rows_of_the_first(tmp_path, models):
    paths, log, _ = models
    cars, voc = (str(write_tree(tmp_path / f"wds_{name}_test")) for name in ("cars", "voc2007"))
    out = tmp_path / "out"
    sets = ["--dataset", cars, voc, "--out", str(out)]
    assert benchmark.main(["--model", *paths, *sets]) == 0
    want = table(out)
    shutil.rmtree(out)
    for path in paths:
        assert benchmark.main(["--model", path, *sets]) == 0
    assert table(out) == want and len(want[1]) == 4
    log.clear()
    assert benchmark.main(["--model", paths[1], "--dataset", cars, "--out", str(out)]) == 0
    results, rows = table(out)
    assert log == [] and len(rows) == 4 and results["aggregates"] == want[0]["aggregates"]
    shutil.rmtree(out / "a")
    assert benchmark.main(["--model", paths[1], *sets]) == 0
    assert {row["label"] for row in table(out)[1]} == {"b"}


def test_the_workers_of_a_cluster_evaluate_the_cells(tmp_path, models, monkeypatch):
    paths, log, _ = models
    cars, voc = (str(write_tree(tmp_path / f"wds_{name}_test")) for name in ("cars", "voc2007"))
    sets = ["--dataset", cars, voc]
    assert benchmark.main(["--model", *paths, *sets, "--out", str(tmp_path / "alone")]) == 0
    log.clear()
    dies = {3: "before", 5: "after"}
    cluster = FakeCluster(2, lambda method, args, number: dies.get(number, ""))
    monkeypatch.setattr(
        "clip_jax.executors.ray_executor.RayExecutor", lambda address, **options: cluster
    )
    flags = ["--out", str(tmp_path / "many"), "--executor", "ray"]
    assert benchmark.main(["--model", *paths, *sets, *flags]) == 0
    for ending in ("csv", "json", "html"):
        texts = [(tmp_path / name / f"results.{ending}").read_text() for name in ("alone", "many")]
        assert texts[0] == texts[1]
    assert cluster.closed and cluster.started > 2 and log.count(paths[0]) >= 1
