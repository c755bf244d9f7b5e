"""Test zero-shot, retrieval and plots against plain definitions, with encoders of a few lines."""

import functools
import json
import math
import zlib

import numpy as np
import pytest
from evaluate_batches import evaluate_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import Encoders, encode_padded, unit_rows
from clip_jax.evaluation.plots import GREEN, loss_curve, prediction_grid
from clip_jax.evaluation.prompts import load_class_names, load_templates
from clip_jax.evaluation.results import write_results
from clip_jax.evaluation.retrieval import recalls, retrieval_ranks
from clip_jax.evaluation.zero_shot import class_embeddings, top_classes, zero_shot_metrics

D = 16
NAMES = ["cat", "dog", "fish", "bird", "horse", "snail"]
TEMPLATES = ["a photo of a {}.", "{}", "the {} and another {}"]


class WordTokenizer:
    """A tokenizer with one id a word, enough for the evaluators."""

    vocab_size, eot_id, pad_id = 1000, 1, 0

    def __call__(self, texts, context_length=77):
        tokens_BL = np.zeros((len(texts), context_length), np.int32)
        for row, text in zip(tokens_BL, texts, strict=True):
            ids = [2 + zlib.crc32(word.encode()) % 998 for word in text.split()][: len(row) - 1]
            row[: len(ids)], row[len(ids)] = ids, self.eot_id
        return tokens_BL

    def decode(self, ids):
        raise NotImplementedError("no evaluator reads ids back")


WORDS_VD = np.random.default_rng(0).normal(size=(1000, D)).astype(np.float32)
PIXELS = np.random.default_rng(1).normal(size=(4 * 4 * 3, D)).astype(np.float32)


def encode_text(tokens_BL):
    return (WORDS_VD[tokens_BL] * (tokens_BL > 0)[..., None]).sum(axis=1)


def encode_image(images_BHWC):
    return (images_BHWC.reshape(len(images_BHWC), -1) / 255 - 0.5).astype(np.float32) @ PIXELS


def make_samples(rng, count):
    return {
        "image": rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8),
        "label": rng.integers(0, len(NAMES), count).astype(np.int32),
        "captions": [[f"caption {i}", f"another of {i}"][: 1 + i % 2] for i in range(count)],
    }


def make_encoders(image=encode_image):
    return Encoders(
        image, encode_text, WordTokenizer(), image_size=4, context_length=12, embed_dim=D,
        scale=100.0, name="toy",
    )  # fmt: skip


def make_batches(samples, batch_size):
    """Make batches as the loader does, the last one filled up with rows of `valid` False."""
    count = len(samples["image"])
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size)
        valid = rows < count
        rows = np.where(valid, rows, 0)
        yield {
            "image": np.where(valid[:, None, None, None], samples["image"][rows], 0),
            "label": np.where(valid, samples["label"][rows], -1),
            "captions": [
                samples["captions"][r] if good else [] for r, good in zip(rows, valid, strict=True)
            ],
            "key": [f"s/{row}" if good else "" for row, good in zip(rows, valid, strict=True)],
            "valid": valid,
        }


def run(batches, class_names=NAMES):
    return evaluate_batches(make_encoders(), batches, class_names, TEMPLATES)


def test_class_embeddings_are_the_definition():
    tokenizer = WordTokenizer()
    want = []
    for name in NAMES:
        z = encode_text(tokenizer([t.format(name, name) for t in TEMPLATES], 12))
        mean = (z / np.linalg.norm(z, axis=1, keepdims=True)).mean(axis=0)
        want.append(mean / np.linalg.norm(mean))
    got = class_embeddings(
        encode_text, tokenizer, NAMES, TEMPLATES, batch_size=4, context_length=12
    )
    # A few additions of float32 numbers below one.
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_class_embeddings_do_not_depend_on_batches():
    shapes = set()

    def watched(tokens_BL):
        shapes.add(tokens_BL.shape)
        return encode_text(tokens_BL)

    embed = functools.partial(
        class_embeddings, watched, WordTokenizer(), NAMES, TEMPLATES, context_length=12
    )
    whole = embed(batch_size=1000)
    assert shapes == {(18, 12)}
    shapes.clear()
    np.testing.assert_array_equal(embed(batch_size=5, max_prompts=7), whole)
    # One shape means one compilation.
    assert shapes == {(5, 12)}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_zero_shot_metrics_are_the_definition(num_classes, count, seed):
    rng = np.random.default_rng(seed)
    z_image_BD, class_MD = (unit_rows(rng.normal(size=(n, 8))) for n in (count, num_classes))
    label_B = rng.integers(0, num_classes, count)
    top_Bk, share_Bk = map(
        np.asarray, top_classes(z_image_BD, class_MD, 10.0, k=min(5, num_classes))
    )
    logits_BM = 10 * z_image_BD.astype(np.float64) @ class_MD.T
    order_BM = np.argsort(-logits_BM, axis=1)
    np.testing.assert_array_equal(top_Bk, order_BM[:, :5])
    share_BM = np.exp(logits_BM) / np.exp(logits_BM).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(share_Bk, np.take_along_axis(share_BM, top_Bk, 1), rtol=1e-4)

    metrics = zero_shot_metrics(top_Bk, label_B, num_classes=num_classes)
    right_B = order_BM[:, 0] == label_B
    assert metrics["acc1"] == pytest.approx(right_B.mean())
    if num_classes < 5:
        assert math.isnan(metrics["acc5"])
    else:
        in_five = [label in order for label, order in zip(label_B, order_BM[:, :5], strict=True)]
        assert metrics["acc5"] == pytest.approx(np.mean(in_five))
    class_recalls = [right_B[label_B == m].mean() for m in np.unique(label_B)]
    assert metrics["mean_per_class_recall"] == pytest.approx(np.mean(class_recalls))


def test_equal_classes_come_in_order():
    z = unit_rows(np.ones((2, 4)))
    top_Bk, _ = top_classes(z, np.repeat(z[:1], 7, axis=0), 100.0, k=5)
    np.testing.assert_array_equal(top_Bk, [[0, 1, 2, 3, 4]] * 2)


def plain_recalls(z_image, z_text, image_of_text, captions, ks):
    """Rank every score at once; `right` says whether a text and an image belong together."""
    scores = z_text @ z_image.T
    captions_of = [
        {captions[t] for t in np.flatnonzero(image_of_text == i)} for i in range(len(z_image))
    ]
    right = np.array([[c in image_captions for image_captions in captions_of] for c in captions])
    metrics = {}
    for direction, s, r in (("image", scores, right), ("text", scores.T, right.T)):
        order = np.argsort(-s, axis=1, kind="stable")
        for k in ks:
            hits = np.take_along_axis(r, order[:, :k], 1).any(axis=1)
            metrics[f"{direction}_retrieval_recall@{k}"] = hits.mean()
    return metrics


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.booleans(), st.integers(0, 2**32 - 1))
def test_retrieval_is_the_definition_in_any_blocks(num_images, per_image, equal, seed):
    rng = np.random.default_rng(seed)
    image_of_text = np.repeat(np.arange(num_images), rng.integers(1, per_image + 1, num_images))
    rng.shuffle(image_of_text)
    count = len(image_of_text)
    # Small whole numbers are exact in float32, so that ties are ties in both computations.
    z_image, z_text = (rng.integers(-2, 3, (n, 3)).astype(np.float32) for n in (num_images, count))
    captions = [f"c{c}" for c in (rng.integers(0, 4, count) if equal else range(count))]
    ks = (1, 2, 5)
    expected = plain_recalls(z_image, z_text, image_of_text, captions, ks)
    for block in (1, 30, 1 << 24):
        ranks = retrieval_ranks(
            z_image,
            z_text,
            image_of_text,
            captions=captions if equal else None,
            block_scores=block,
        )
        assert recalls(ranks, ks) == pytest.approx(expected)


def test_every_image_counts_once_whatever_the_batches():
    samples = make_samples(np.random.default_rng(3), 23)
    reports = [run(make_batches(samples, size)) for size in (1, 5, 8, 23, 40)]
    for report in reports[1:]:
        for task, metrics in report.metrics.items():
            assert metrics == pytest.approx(reports[0].metrics[task])
        assert len(report.examples.guesses) == 23
        assert report.examples.rows == list(range(23))
        assert report.examples.truths == reports[0].examples.truths
    assert set(reports[0].metrics) == {"zeroshot_classification", "zeroshot_retrieval"}
    assert len(reports[0].metrics["zeroshot_retrieval"]) == 6


def test_bad_rows_count_nowhere():
    rng = np.random.default_rng(4)
    samples = make_samples(rng, 16)
    (good,) = make_batches(samples, 16)
    (bad,) = make_batches(samples, 16)
    more = {name: values[:5] for name, values in bad.items()}
    more["valid"] = np.zeros(5, bool)
    more["label"] = np.full(5, 3, np.int32)
    assert run([more, good, more]).metrics == run([good]).metrics


def test_unknown_labels_are_left_out_of_classification_alone():
    samples = make_samples(np.random.default_rng(5), 12)
    known = {name: values[:8] for name, values in samples.items()}
    samples["label"][8:] = -1
    got, want = (run(make_batches(s, 4)).metrics for s in (samples, known))
    task = "zeroshot_classification"
    assert got[task] == pytest.approx(want[task])
    assert got != want


def test_a_perfect_encoder_scores_one():
    labels = np.arange(6).repeat(3).astype(np.int32)
    batch = {
        "image": np.zeros((18, 4, 4, 3), np.uint8) + labels[:, None, None, None].astype(np.uint8),
        "label": labels,
        "captions": [[NAMES[m]] for m in labels],
        "key": [""] * 18,
        "valid": np.ones(18, bool),
    }

    def see(images):
        return encode_text(WordTokenizer()([NAMES[m] for m in images[:, 0, 0, 0]], 12))

    report = evaluate_batches(make_encoders(see), [batch], NAMES, ["{}"], num_examples=4)
    for metrics in report.metrics.values():
        assert {v for name, v in metrics.items() if name != "calibration_error"} == {1.0}
    assert all(r["intervals"][n] == (1, 1) for r in report.results for n in r["intervals"])
    assert len(report.examples.rows) == 4
    for truth, guesses in zip(report.examples.truths, report.examples.guesses, strict=True):
        assert guesses[0][0] == truth


def test_tasks_without_data_are_absent():
    samples = make_samples(np.random.default_rng(6), 6)
    only_texts = run(make_batches(samples, 6), class_names=[])
    assert set(only_texts.metrics) == {"zeroshot_retrieval"}
    assert only_texts.examples is None
    samples["captions"] = [[]] * 6
    assert set(run(make_batches(samples, 6)).metrics) == {"zeroshot_classification"}


def test_results_are_json_with_clip_benchmarks_fields(tmp_path):
    samples = make_samples(np.random.default_rng(7), 6)
    samples["label"] %= 3
    report = run(make_batches(samples, 6), class_names=NAMES[:3])
    write_results(report.results, {"truncated": 2}, tmp_path / "eval.json")
    written = json.loads((tmp_path / "eval.json").read_text())
    first, second = written["results"]
    assert first["metrics"]["acc5"] is None
    theirs = {"dataset", "model", "pretrained", "language", "task", "metrics"}
    assert set(first) == theirs | {"intervals", "images"}
    assert [first["task"], second["task"]] == ["zeroshot_classification", "zeroshot_retrieval"]
    assert written["skipped"] == {"truncated": 2}


def test_mistakes_are_named():
    embed = functools.partial(
        class_embeddings, encode_text, WordTokenizer(), batch_size=4, context_length=12
    )
    samples = make_samples(np.random.default_rng(8), 4)
    with pytest.raises(UserError, match="label 9 is no class: there are 6"):
        run(make_batches(samples | {"label": np.full(4, 9, np.int32)}, 4))
    with pytest.raises(UserError, match="no image that could be read"):
        run([])
    with pytest.raises(UserError, match="1 of 2 features are not finite"):
        unit_rows(np.array([[1.0, 2.0], [np.nan, 0.0]]))
    with pytest.raises(UserError, match="no class names"):
        embed([], TEMPLATES)
    with pytest.raises(UserError, match="template 2, 'a photo'"):
        embed(NAMES, ["{}", "a photo"])


def test_zero_features_stay_zero():
    assert (encode_padded(lambda tokens: np.zeros((4, D)), np.zeros((3, 5), int), 4) == 0).all()


def test_names_and_templates_from_files(tmp_path):
    text, listed = tmp_path / "names.txt", tmp_path / "names.json"
    text.write_bytes("cat\r\nice cream\nмяч\n".encode())
    listed.write_text('["cat", "ice cream"]')
    assert load_class_names(text) == ["cat", "ice cream", "мяч"]
    assert load_class_names(listed) == ["cat", "ice cream"]
    assert load_templates("photo") == ["a photo of a {}."]
    assert load_templates(["a {c}"]) == ["a {}"]
    text.write_text("a {}\na {c}.\n")
    assert load_templates(str(text)) == ["a {}", "a {}."]
    for content, message in (
        (b"cat\n\ndog\n", "number 2 of 3 is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "number 1 of 1 is empty"),
    ):
        text.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_class_names(text)
    listed.write_text('{"cat": 1}')
    with pytest.raises(UserError, match="one JSON list of strings"):
        load_class_names(listed)
    with pytest.raises(UserError, match="No such file"):
        load_class_names(tmp_path / "absent.txt")


def test_a_grid_is_drawn_with_right_guesses_in_green(tmp_path):
    images = [np.full((8, 8, 3), 90, np.uint8), np.zeros((5, 20, 3), np.uint8)]
    wrong = [[("a dog", 0.7), ("日本 \ud800\n語" * 40, 0.1)], [("мяч", 1.0)]]
    right = [[("a cat", 0.7)], wrong[1]]
    truths = ["a cat", "x"]

    def green_pixels(guesses):
        path = prediction_grid(images, truths, guesses, tmp_path / "deep" / "grid.png")
        return int((np.asarray(Image.open(path)) == GREEN).all(axis=-1).sum())

    assert green_pixels(wrong) == 0
    assert green_pixels(right) > 20
    with pytest.raises(UserError, match="no images"):
        prediction_grid([], [], [], tmp_path / "none.png")


def test_a_loss_curve_is_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    keys = ("loss", "image_accuracy", "text_accuracy", "logit_scale", "learning_rate")
    lines = [json.dumps({"step": s} | dict.fromkeys(keys, 1 / (s + 1))) for s in range(5)]
    lines += ['{"step": 5, "loss": "NaN", "logit_scale": 1e9, "note": "text"}', '{"step": 6, "lo']
    path.write_text("\n".join(lines))
    with Image.open(loss_curve(path, tmp_path / "curve.png")) as image:
        assert image.size[0] > 800
    path.write_text("\n".join(lines[-1:] + lines[:1]))
    with pytest.raises(UserError, match="line 1 is not a line of metrics"):
        loss_curve(path, tmp_path / "curve.png")
    path.write_text("")
    with pytest.raises(UserError, match="no training step yet"):
        loss_curve(path, tmp_path / "curve.png")
