"""Test probes, neighbors, intervals, calibration, and features over a mesh and in their store."""

import dataclasses
import functools
import json

import chex
import jax
import numpy as np
import pytest
from data_cases import ToyTokenizer, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VIT

from clip_jax.data.images import OPENAI
from clip_jax.errors import UserError
from clip_jax.evaluation.bootstrap import (
    mean_recall_interval,
    ratio_intervals,
    score_intervals,
)
from clip_jax.evaluation.calibration import calibration_error, reliability
from clip_jax.evaluation.encoders import (
    Encoders,
    mesh_image_encoder,
    mesh_text_encoder,
    unit_rows,
)
from clip_jax.evaluation.feature_store import encode_dataset
from clip_jax.evaluation.features import FeatureSet
from clip_jax.evaluation.in_training import make_evaluator
from clip_jax.evaluation.knn import knn_votes
from clip_jax.evaluation.linear_probe import MAX_FITS, choose_c, draw_shots, fit
from clip_jax.evaluation.prompts import load_class_names, load_templates, shipped_templates
from clip_jax.evaluation.run import run_evaluation
from clip_jax.evaluation.spec import EvalSpec
from clip_jax.evaluation.tasks import TaskInputs, check_tasks, few_shot, knn, linear_probe
from clip_jax.parallel.mesh import make_mesh
from clip_jax.sections import EvalSection
from clip_jax.tools import evaluate

SIDE, D = 12, 8
WEIGHTS = np.random.default_rng(0).normal(size=(SIDE * SIDE * 3, D)).astype(np.float32)
WORDS = np.random.default_rng(1).normal(size=(ToyTokenizer.vocab_size, D)).astype(np.float32)


def encode_image(images_BHWC):
    return (images_BHWC.reshape(len(images_BHWC), -1) / 255.0) @ WEIGHTS


def encode_text(tokens_BL):
    return (WORDS[np.asarray(tokens_BL)] * (np.asarray(tokens_BL) > 0)[..., None]).sum(axis=1)


def toy_encoders(image=encode_image, text=encode_text, **fields):
    return Encoders(
        image, text, ToyTokenizer(), image_size=SIDE, context_length=16, embed_dim=D,
        **{"scale": 100.0, "name": "toy"} | fields,
    )  # fmt: skip


def spec_of(data, **changes):
    return EvalSpec.from_section(EvalSection(data=str(data)), **changes)


def clusters(rng, rows, classes=4, width=6, noise=0.5):
    centers = rng.normal(size=(classes, width))
    label_B = rng.integers(classes, size=rows)
    return unit_rows(centers[label_B] + noise * rng.normal(size=(rows, width))), label_B


def feature_set(z_BD, label_B):
    return FeatureSet(
        z_BD, np.arange(len(z_BD)), label_B.astype(np.int32), [""] * len(z_BD),
        np.zeros((0, z_BD.shape[1]), np.float32), [], np.zeros(0, np.int64), {},
    )  # fmt: skip


def task_inputs(test, train=None, *, progress=False, **changes):
    return TaskInputs(
        spec=spec_of("", **changes), test=test, scale=100.0, train=train, progress=progress
    )


@pytest.mark.parametrize("c", [0.1, 10.0])
def test_the_probe_is_at_the_minimum_on_any_mesh(c):
    x_BD, y_B = clusters(np.random.default_rng(2), 203)
    alone = fit(x_BD, y_B, num_classes=4, c=c, tolerance=1e-6)
    mesh = make_mesh(data=4, fsdp=2, tensor=1)
    # The gradient of C * sum of cross-entropies + |W|^2 / 2 in float64, over C and the rows: of
    # float32 sums of terms below 1 some 1e-6 is left, times what the coordinates' change stretches.
    logits_BM = x_BD.astype(np.float64) @ alone.weights_MD.T + alone.bias_M
    p_BM = np.exp(logits_BM - logits_BM.max(axis=1, keepdims=True))
    p_BM /= p_BM.sum(axis=1, keepdims=True)
    off_BM = (p_BM - np.eye(4)[y_B]) / len(y_B)
    assert np.abs(off_BM.T @ x_BD + alone.weights_MD / (c * len(y_B))).max() < 2e-5
    assert np.abs(off_BM.sum(axis=0)).max() < 2e-5
    # 203 rows are no multiple of 8: the rows that fill them up weigh nothing.
    split = fit(x_BD, y_B, num_classes=4, c=c, tolerance=1e-6, mesh=mesh)
    np.testing.assert_allclose(split.logits(x_BD), alone.logits(x_BD), atol=2e-2)
    assert (split.logits(x_BD).argmax(1) == alone.logits(x_BD).argmax(1)).all()


def test_the_probe_calls_back_and_does_not_depend_on_how_often(capfd):
    x_BD, y_B = clusters(np.random.default_rng(4), 90)
    fit_one, steps = functools.partial(fit, num_classes=4, c=10.0), []
    mesh = make_mesh(data=8, fsdp=1, tensor=1)
    whole, split = fit_one(x_BD, y_B), fit_one(x_BD, y_B, mesh=mesh)
    often = fit_one(x_BD, y_B, steps_per_call=4, on_steps=steps.append)
    assert steps == [*range(4, whole.steps, 4), whole.steps] and len(steps) > 1
    np.testing.assert_array_equal(often.weights_MD, whole.weights_MD)
    np.testing.assert_array_equal(often.bias_M, whole.bias_M)
    often = fit_one(x_BD, y_B, steps_per_call=4, mesh=mesh)
    np.testing.assert_array_equal(often.weights_MD, split.weights_MD)
    assert fit_one(x_BD, y_B, max_steps=6).steps == 6
    rest = feature_set(x_BD, y_B)
    linear_probe(task_inputs(rest, rest, progress=True))
    assert "linear_probe: 100%" in (shown := capfd.readouterr().err) and ", step " in shown


def test_c_is_the_best_of_what_the_search_tried():
    peak, fitted = -1.375, []

    class Ranked:
        def __init__(self, c):
            self.off = abs(np.log10(c) - peak)

        def logits(self, z_BD):
            right = np.arange(1000) >= 50 * self.off
            return np.stack([right, ~right], axis=1)

    def fit_one(x, y, *, c):
        fitted.append(c)
        return Ranked(c)

    data = np.zeros((1000, 2), np.float32), np.zeros(1000, int)
    c, tried = choose_c(data, data, fit_one)
    # An eighth of a decade, as the paper has it, and far fewer than its 97 values.
    assert c == pytest.approx(10**peak) and max(tried, key=tried.get) == c
    assert len(fitted) == len(set(fitted)) <= MAX_FITS


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_neighbors_vote_as_defined(rows, train, k, seed):
    rng = np.random.default_rng(seed)
    (z_BD, _), (x_ND, y_N) = clusters(rng, rows), clusters(rng, train)
    actual = knn_votes(z_BD, x_ND, y_N, num_classes=4, k=k)
    cosine = z_BD.astype(np.float64) @ x_ND.T
    order = np.argsort(-cosine, axis=1)[:, :k]
    near = np.take_along_axis(cosine, order, 1)
    votes = np.exp((near - near[:, :1]) / 0.07)
    expected = [[v[y_N[o] == m].sum() for m in range(4)] for v, o in zip(votes, order, strict=True)]
    # exp(x / 0.07) makes 14 times the rounding of a float32 cosine.
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_learning_tasks_tell_clusters_apart_and_refuse_to_guess():
    rng = np.random.default_rng(3)
    z_BD, y_B = clusters(rng, 300, noise=0.15)
    rest = feature_set(z_BD[100:], y_B[100:])
    inputs = task_inputs(feature_set(z_BD[:100], y_B[:100]), rest, shots=(1, 4))
    (probe,), (near,), shots = linear_probe(inputs), knn(inputs), few_shot(inputs, draws=2)
    assert probe.metrics["lp_acc1"] > 0.9 and near.metrics["knn_acc1"] > 0.9
    assert [s.metrics["fewshot_k"] for s in shots] == [1.0, 4.0]

    def with_shots(*shots, **fields):
        spec = dataclasses.replace(inputs.spec, shots=shots)
        return dataclasses.replace(inputs, spec=spec, **fields)

    validated = with_shots(4, validation=feature_set(z_BD[200:], y_B[200:]))
    (chosen,), rows = few_shot(validated, draws=1), draw_shots(y_B[100:], 4, seed=0)
    drawn = z_BD[100:][rows], y_B[100:][rows]
    best, _ = choose_c(drawn, (z_BD[200:], y_B[200:]), functools.partial(fit, num_classes=4))
    assert chosen.metrics["C"] == pytest.approx(best) and shots[0].metrics["C"] == 1
    low, high = probe.intervals["lp_acc1"]
    assert low <= probe.metrics["lp_acc1"] <= high
    assert (np.bincount(y_B[draw_shots(y_B, 3, seed=0)]) == 3).all()
    with pytest.raises(UserError, match="give --train-data"):
        linear_probe(task_inputs(rest))
    possible = few_shot(with_shots(1000, 1), draws=1)
    assert [s.metrics["fewshot_k"] for s in possible] == [1.0]
    with pytest.raises(UserError, match=r"no class has more than [0-9]+ training images"):
        few_shot(with_shots(1000))
    unlabeled = feature_set(z_BD, np.full(300, -1))
    with pytest.raises(UserError, match="linear_probe: no image of the test data has a label"):
        linear_probe(dataclasses.replace(inputs, test=unlabeled))
    with pytest.raises(UserError, match="no task 'zeroshot'; the tasks are zeroshot_class"):
        check_tasks(["zeroshot"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shots", "1,two"], "--shots '1,two' is no list of whole numbers"),
        (["--shots", "0"], "must be at least 1"),
        (["--neighbors", "0"], "--neighbors, --batch-size and --shots must be at least 1"),
        (["--neighbours", "0"], "must be at least 1"),
        (["--batch-size", "0"], "must be at least 1"),
        (["--dataset", "imagenet1K"], "no class names are shipped for --dataset imagenet1K"),
        (["--dataset", "objectnet"], "give --classnames, or one of .*imagenet1k"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(["--model", str(tmp_path), "--data", "none.tar", *flags])


def test_eval_json_has_the_names_of_earlier_versions():
    spec = spec_of("x.tar", neighbors=5)
    names = (
        "data", "classnames", "templates", "ablate", "tasks", "train_data", "val_data",
        "batch_size", "dataset", "pretrained", "neighbours", "shots", "confuse_equal_captions",
    )  # fmt: skip
    assert tuple(spec.to_json()) == names
    assert spec.to_json()["neighbours"] == 5 and spec.tasks == EvalSection().tasks


def test_nothing_is_encoded_before_a_mistake_is_named(tmp_path):
    write_shards(tmp_path, [5], side=SIDE)
    encoders, seen = over_eight_devices()
    evaluate_spec = functools.partial(
        run_evaluation, encoders, folder=tmp_path / "out", progress=False
    )
    with pytest.raises(UserError, match="no task 'few'"):
        evaluate_spec(spec_of(tmp_path, tasks=["few"]))
    with pytest.raises(UserError, match="few_shot learns from labeled images"):
        evaluate_spec(spec_of(tmp_path, tasks=["few_shot"]))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"--out .*/out cannot be made .*; give another"):
        evaluate_spec(spec_of(tmp_path))
    assert not seen


def test_intervals_hold_what_they_should():
    rng = np.random.default_rng(4)
    label_B, right_B = rng.integers(5, size=400), rng.random(400) < 0.3
    hits = right_B.astype(float)[:, None]
    ((low, high),) = ratio_intervals(hits, np.ones((400, 1)))
    # The normal approximation of a share's error; 1,000 resamples leave some 5 % of its width.
    spread = 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 400)
    assert low == pytest.approx(hits.mean() - spread, abs=0.15 * spread)
    assert high == pytest.approx(hits.mean() + spread, abs=0.15 * spread)
    # Three equal captions an image bring no news.
    assert ratio_intervals(3 * hits, np.full((400, 1), 3.0)) == [(low, high)]
    a, b = mean_recall_interval(right_B, label_B)
    assert a < np.mean([right_B[label_B == m].mean() for m in range(5)]) < b
    # One image a class is as uncertain as the images are.
    a, b = mean_recall_interval(right_B, np.arange(400))
    assert b - a > spread
    assert ratio_intervals(np.zeros((5, 1)), np.ones((5, 1))) == [(0.0, 0.0)]


def test_calibration_error_is_the_definition():
    share_B = np.array([0.05, 0.95, 0.95, 0.95, 1.0])
    right_B = np.array([False, True, True, False, True])
    # Two bins: one image at 0.05, never right; four at 0.9625, three of them right.
    assert calibration_error(share_B, right_B, bins=10) == pytest.approx(
        (1 * 0.05 + 4 * abs(0.9625 - 0.75)) / 5
    )
    assert [row["images"] for row in reliability(share_B, right_B, bins=10)] == [1] + [0] * 8 + [4]


def over_eight_devices():
    """Return encoders over a mesh, and the list of (shape, devices) of the images they meet."""
    mesh = make_mesh(data=4, fsdp=2, tensor=1)
    seen = []

    @jax.jit
    def image(images):
        return (images.reshape(len(images), -1) / 255.0) @ WEIGHTS

    @jax.jit
    def text(tokens):
        return (jax.numpy.asarray(WORDS)[tokens] * (tokens > 0)[..., None]).sum(axis=1)

    def watched(images):
        seen.append((images.shape, len(images.sharding.device_set)))
        return image(images)

    encoders = toy_encoders(
        mesh_image_encoder(watched, mesh), mesh_text_encoder(text, mesh), identity="a", mesh=mesh
    )
    return encoders, seen


def test_a_prime_number_of_images_on_eight_devices_counts_each_once(tmp_path):
    write_shards(tmp_path, [20, 17], side=SIDE)
    (tmp_path / "names.txt").write_text("".join(f"name {i}\n" for i in range(7)))
    spec = spec_of(
        tmp_path, classnames=str(tmp_path / "names.txt"), templates=["{}", "a {}"],
        ablate=["{}", "a {}"], batch_size=10,
    )  # fmt: skip
    encoders, seen = over_eight_devices()
    evaluation = run_evaluation(encoders, spec, folder=tmp_path / "out", progress=False)
    results = evaluation.results
    names = {"eval.json", "predictions.png", "confusion.csv"}
    assert {path.name for path in evaluation.paths} == names
    assert all(path.parent == tmp_path / "out" and path.exists() for path in evaluation.paths)
    # Batches of 10 become 16, so that eight devices share them; every one has that shape.
    assert set(seen) == {((16, SIDE, SIDE, 3), 8)} and len(seen) == 3
    assert [r["images"] for r in results] == [37, 37]
    alone = toy_encoders(identity="b")
    expected = run_evaluation(alone, spec, folder=tmp_path / "alone", progress=False).results
    for split, single in zip(results, expected, strict=True):
        assert split["metrics"] == pytest.approx(single["metrics"], abs=1e-6)
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [a["template"] for a in written["ablation"]] == ["{}", "a {}", "all 2 together"]
    assert written["ablation"][2]["acc1"] == pytest.approx(results[0]["metrics"]["acc1"])
    rows = (tmp_path / "out" / "confusion.csv").read_text().splitlines()
    assert rows[0] == "truth,guess,images"
    assert sum(int(row.rsplit(",", 1)[1]) for row in rows[1:]) == 37

    # Again, with other tasks: nothing is encoded twice; with other weights everything is.
    before = len(seen)
    again = run_evaluation(encoders, spec, folder=tmp_path / "out", progress=False)
    assert again.results == results and len(seen) == before
    other = dataclasses.replace(encoders, identity="c")
    run_evaluation(other, spec, folder=tmp_path / "out", progress=False)
    assert len(seen) == 2 * before


def test_an_evaluation_that_was_killed_goes_on_at_its_last_part(tmp_path):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (23, SIDE, SIDE, 3), dtype=np.uint8)
    seen = []

    def batches_from(start, stop=None):
        for step in range(start, 6):
            if step == stop:
                raise KeyboardInterrupt
            rows = np.arange(step * 4, step * 4 + 4)
            valid = rows < 23
            seen.append(step)
            yield {
                "image": images[np.minimum(rows, 22)],
                "valid": valid,
                "label": rows % 3,
                "key": [f"k{r}" for r in rows],
                "captions": [[f"caption {r}"] * (r % 3) for r in rows],
            }

    def run(source, folder):
        return encode_dataset(
            toy_encoders(), source, batch_size=4, batches_per_part=2, folder=folder, title="toy",
            progress=False,
        )  # fmt: skip

    whole = run(batches_from, None)
    assert len(whole) == 23 and whole.row_B.tolist() == list(range(23))
    with pytest.raises(KeyboardInterrupt):
        run(lambda start: batches_from(start, 5), tmp_path)
    seen.clear()
    resumed = run(batches_from, tmp_path)
    assert seen == [4, 5]
    chex.assert_trees_all_equal(vars(resumed), vars(whole))
    # A part that was damaged is encoded again.
    part = tmp_path / "part-00001.npz"
    data = part.read_bytes()
    flipped = data[:300] + bytes([data[300] ^ 255]) + data[301:]
    for damaged in (b"", b"PK", data[: len(data) // 2], flipped):
        part.write_bytes(damaged)
        seen.clear()
        np.testing.assert_array_equal(run(batches_from, tmp_path).z_image_BD, whole.z_image_BD)
        assert seen == [2, 3, 4, 5]


def test_shipped_names_and_templates():
    assert len(load_class_names("imagenet1k")) == 1000 and len(load_class_names("pets")) == 37
    assert [len(load_templates(f"imagenet_{n}")) for n in (1, 7, 80)] == [1, 7, 80]
    assert load_templates(["{}", "imagenet_7"]) == ["{}", *load_templates("imagenet_7")]
    # Every shipped list is fit for use.
    for name in shipped_templates():
        assert load_templates(name)
    # Every data set that has prompts has names: CLIP_benchmark's own and the classes of ImageNet.
    lists = {"dummy", "imagenet_1", "imagenet_7", "imagenet_80"}
    for name in set(shipped_templates()) - lists:
        assert len(load_class_names(name)) > 1
    assert len(load_class_names("fgvc_aircraft")) == 100


def test_evaluation_during_a_run_compiles_once_and_follows_the_parameters(tmp_path):
    write_shards(tmp_path, [20], side=SIDE)
    (tmp_path / "names.txt").write_text("".join(f"name {i}\n" for i in range(7)))
    spec = spec_of(tmp_path, classnames=str(tmp_path / "names.txt"), batch_size=8)
    config = dataclasses.replace(
        VIT,
        vision=dataclasses.replace(VIT.vision, image_size=SIDE, patch_size=4),
        text=dataclasses.replace(VIT.text, context_length=16),
    )
    traced = []

    @jax.jit
    def image(variables, images):
        traced.append(images.shape)
        return (images.reshape(len(images), -1) / 255.0) @ variables["params"]["image"]

    @jax.jit
    def text(variables, tokens):
        z = variables["params"]["text"][tokens]
        return (z * (tokens > 0)[..., None]).sum(axis=1)

    evaluate = make_evaluator(
        image, text, spec, make_mesh(data=8, fsdp=1, tensor=1), config=config,
        tokenizer=ToyTokenizer(), preprocess=OPENAI, scale=lambda variables: 10.0,
    )  # fmt: skip
    first = evaluate({"params": {"image": WEIGHTS, "text": WORDS}})
    second = evaluate({"params": {"image": -WEIGHTS, "text": WORDS}})
    assert len(traced) == 1 and first != second
    alone = toy_encoders(scale=10.0)
    results = run_evaluation(alone, spec, folder=tmp_path / "out", progress=False).results
    expected = results[0]["metrics"] | results[1]["metrics"]
    # Sums of float32 numbers in another order; ranks are the same.
    assert first == pytest.approx(expected, abs=1e-6)


def test_intervals_of_any_figure_are_those_of_a_share_where_it_is_one():
    right = np.random.default_rng(1).random(300) < 0.7

    def score(rows):
        figures = {"share": float(right[rows].mean())}
        return figures | ({"rare": 1.0} if 0 in rows else {})

    (want,) = ratio_intervals(right[:, None].astype(float), np.ones((300, 1)))
    assert score_intervals(score, 300) == {"share": pytest.approx(want)}
