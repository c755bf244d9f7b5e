"""Test trees of CLIP_benchmark's own converter: its JSON and that of this project agree."""

import json
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("open_clip")
pytest.importorskip("clip_benchmark")

import open_clip
import torch
from benchmark_trees import NAMES, TEMPLATES, png, write_choices
from clip_benchmark import cli, webdataset_builder
from clip_benchmark.metrics import image_caption_selection, zeroshot_classification
from safetensors.torch import save_file

from clip_jax.evaluation.caption_choice import choice_metrics, open_choices
from clip_jax.evaluation.groups import GROUP_SCORES, macro_scores
from clip_jax.evaluation.multilabel import average_precisions
from clip_jax.tools import benchmark, evaluate

CFG = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "patch_size": 8,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny CLIP of open_clip's in its own folder, off its special start."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    made = open_clip.CLIP(**CFG).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            value += 0.05 * torch.randn_like(value) * (name != "logit_scale")
    save_file(made.state_dict(), str(folder / "open_clip_model.safetensors"))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    config = {"model_cfg": CFG, "preprocess_cfg": {"mean": mean, "std": std}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


class Samples(list):
    """Samples as CLIP_benchmark's converter takes them."""

    classes, templates = NAMES, TEMPLATES


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """The three kinds of folders, written by CLIP_benchmark's own functions."""
    root = tmp_path_factory.mktemp("trees")
    with pytest.MonkeyPatch.context() as patch:
        # Its eight worker processes are more than this machine may have.
        loader = torch.utils.data.DataLoader
        patch.setattr(
            torch.utils.data, "DataLoader", lambda *a, **o: loader(*a, **o | {"num_workers": 0})
        )
        convert(root)
    return root


def convert(root):
    rng = np.random.default_rng(0)
    options = {"image_format": "png", "max_count": 20, "verbose": False}
    single = Samples((png(i), int(rng.integers(len(NAMES)))) for i in range(53))
    webdataset_builder.convert_dataset(single, "test", str(root / "cars"), **options)
    several = Samples((png(i), rng.integers(0, 2, len(NAMES))) for i in range(53))
    webdataset_builder.convert_dataset(
        several, "test", str(root / "many"), multilabel=True, **options
    )
    captions = [(png(i), [f"a {i} {j} thing" for j in range(1 + i % 3)]) for i in range(53)]
    webdataset_builder.convert_retrieval_dataset(captions, "test", str(root / "flickr"), **options)


def theirs(model, root, name, task, out, monkeypatch):
    """Run CLIP_benchmark's command; return the JSON that it writes."""
    # CLIP_benchmark 1.6.2 calls float() on arrays of one element, which numpy 2.4 refuses.
    monkeypatch.setattr(
        zeroshot_classification, "float", lambda v: float(np.asarray(v).item()), raising=False
    )
    argv = ["clip_benchmark", "eval", "--model", f"local-dir:{model}", "--pretrained", "none"]
    argv += ["--dataset", f"wds/{name}", "--dataset_root", str(root / name), "--task", task]
    argv += ["--no_amp", "--num_workers", "0", "--batch_size", "16", "--recall_k", "1", "5", "10"]
    monkeypatch.setattr(sys, "argv", [*argv, "--output", str(out / f"{name}.json")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.main()
    return json.loads((out / f"{name}.json").read_text())


KINDS = {
    "cars": "zeroshot_classification",
    "many": "zeroshot_classification",
    "flickr": "zeroshot_retrieval",
}


def test_a_converted_tree_gives_the_same_json(model, trees, tmp_path, monkeypatch):
    folders = [str(trees / name) for name in KINDS]
    argv = ["--model", str(model), "--dataset", *folders, "--out", str(tmp_path / "table")]
    assert benchmark.main(argv) == 0
    rows = json.loads((tmp_path / "table" / "results.json").read_text())["results"]
    for row, (name, task) in zip(rows, KINDS.items(), strict=True):
        expected = theirs(model, trees, name, task, tmp_path, monkeypatch)
        assert (row["task"], row["dataset"], row["language"]) == (task, name, "en")
        for metric, value in expected["metrics"].items():
            assert row["metrics"][metric] == pytest.approx(value, abs=1e-6), (name, metric)
        print(name, expected["metrics"])
    # One data set by `evaluate` itself.
    out = tmp_path / "one"
    assert evaluate.main(["--model", str(model), "--data", folders[1], "--out", str(out)]) == 0
    (row,) = json.loads((out / "eval.json").read_text())["results"]
    assert row["metrics"] == rows[1]["metrics"]


def test_metrics_on_the_same_features():
    from sklearn.metrics import average_precision_score, f1_score, recall_score

    rng = np.random.default_rng(0)
    score = rng.normal(size=(200, 12)).astype(np.float32)
    target = (rng.random((200, 12)) < 0.2).astype(np.int64)
    target[:, 3] = 0  # a class without images
    want = zeroshot_classification.average_precision_per_class(
        torch.from_numpy(score), torch.from_numpy(target)
    )
    got = average_precisions(score, target != 0)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-6)
    for m in (0, 5):
        # scikit-learn's own definition is the same where scores differ.
        assert got[m] == pytest.approx(average_precision_score(target[:, m], score[:, m]))
    label, guess = rng.integers(9, size=300), rng.integers(12, size=300)
    want = [
        score(label, guess, labels=np.unique(label), average="macro")
        for score in (recall_score, f1_score)
    ]
    assert macro_scores(guess, label) == pytest.approx(want)


@pytest.mark.parametrize("name", ["sugar_crepe", "winoground"])
def test_choices_on_the_same_features(name, tmp_path):
    choices = open_choices(str(write_choices(tmp_path)[name]))
    rng = np.random.default_rng(1)
    images, texts = (
        rng.normal(size=(count, 6)).astype(np.float32)
        for count in (len(choices), len(choices.captions_of_all))
    )
    images, texts = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (images, texts))

    class Model:
        """Images and texts are their own numbers."""

        def encode_image(self, x):
            return torch.from_numpy(images)[x[:, 0, 0, 0].long()]

        def encode_text(self, tokens):
            return torch.from_numpy(texts)[tokens]

    batch_images = torch.tensor([example.images for example in choices.examples])
    batch_texts = [[choices.captions_of_all[t] for t in e.captions] for e in choices.examples]
    numbers = {caption: i for i, caption in enumerate(choices.captions_of_all)}
    want = image_caption_selection.evaluate(
        Model(),
        [(batch_images[..., None, None, None], batch_texts)],
        lambda rows: torch.tensor([numbers[row] for row in rows]),
        "cpu",
        amp=False,
    )
    got, _ = choice_metrics(choices, images, np.arange(len(images)), texts)
    assert got == pytest.approx(want, abs=1e-6)


def test_groups_against_wilds(monkeypatch):
    pytest.importorskip("wilds")
    from wilds.common import utils
    from wilds.common.metrics import metric
    from wilds.common.metrics.all_metrics import F1, Accuracy, Recall

    def avg_over_groups(v, g, n_groups):
        """Do as WILDS' own, without torch_scatter, which DataComp replaces too."""
        counts = utils.get_counts(g, n_groups)
        return torch.zeros(n_groups).scatter_add_(0, g, v) / counts, counts

    monkeypatch.setattr(metric, "avg_over_groups", avg_over_groups)
    rng = np.random.default_rng(0)
    label, groups = rng.integers(6, size=300), rng.integers(5, size=(300, 9))
    groups[groups == 3] = 0  # a group without images
    top = np.stack([rng.permutation(6)[:5] for _ in label])
    torch_label, first = torch.from_numpy(label), torch.from_numpy(top[:, 0])

    def worst(accuracy, guess, column):
        group = torch.from_numpy(groups[:, column])
        return accuracy.compute_group_wise(guess, torch_label, group, 5)[f"{accuracy.name}_wg"]

    accuracy = Accuracy(prediction_fn=None)
    scores = {
        name: GROUP_SCORES[name].score(top, label, groups[:, : len(GROUP_SCORES[name].columns)])
        for name in GROUP_SCORES
    }
    assert scores["fmow"]["acc_worst_region"] == pytest.approx(worst(accuracy, first, 0))
    assert scores["fmow"]["acc_worst_year"] == pytest.approx(worst(accuracy, first, 1))
    assert scores["geode"]["acc_wg"] == pytest.approx(worst(accuracy, first, 0))
    assert scores["camelyon17"]["acc_wg"] == pytest.approx(worst(accuracy, first, 1))
    for kind in (Recall, F1):
        (item,) = kind(prediction_fn=None, average="macro").compute(first, torch_label).items()
        assert scores["iwildcam"][item[0]] == pytest.approx(item[1])

    class TopAccuracy(Accuracy):
        """The accuracy of DataComp's Dollar Street: the class is one of five."""

        def _compute_element_wise(self, y_pred, y_true):
            return (y_pred == y_true[:, None]).any(-1).float()

    top5 = TopAccuracy(prediction_fn=None, name="acc_top5")
    want = worst(top5, torch.from_numpy(top), 0)
    assert scores["dollar_street"]["acc_top5_wg"] == pytest.approx(want)
