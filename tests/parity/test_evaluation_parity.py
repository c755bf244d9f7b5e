"""Test zero-shot, retrieval and probe numbers against open_clip and CLIP_benchmark themselves."""

import numpy as np
import pytest
from evaluate_batches import evaluate_batches

from clip_jax.evaluation.encoders import Encoders
from clip_jax.evaluation.retrieval import recalls, retrieval_ranks
from clip_jax.evaluation.zero_shot import class_embeddings
from clip_jax.tokenizers import make_clip_tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("open_clip")
pytest.importorskip("clip_benchmark")


NAMES = ["tench", "goldfish", "great white shark", "hen", "ostrich", "café chair", "hen"]
TEMPLATES = ["a photo of a {}.", "itap of the {}.", "{}"]
D = 24


class Encoder(torch.nn.Module):
    """A pair of random linear maps under CLIP's method names."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randn(49408, D, generator=generator)
        self.pixels = torch.randn(4 * 4 * 3, D, generator=generator)

    def encode_text(self, tokens, normalize=False):
        z = (self.words[tokens.long()] * (tokens > 0)[..., None]).sum(1)
        return torch.nn.functional.normalize(z, dim=-1) if normalize else z

    def encode_image(self, images, normalize=False):
        z = (images.float() / 255 - 0.5).flatten(1) @ self.pixels
        return torch.nn.functional.normalize(z, dim=-1) if normalize else z


ENCODER = Encoder()


def encode_text(tokens_BL):
    return ENCODER.encode_text(torch.from_numpy(np.ascontiguousarray(tokens_BL))).numpy()


def encode_image(images_BHWC):
    return ENCODER.encode_image(torch.from_numpy(images_BHWC)).numpy()


def evaluate(batches, class_names, templates):
    encoders = Encoders(
        encode_image, encode_text, make_clip_tokenizer(), image_size=4, context_length=77,
        embed_dim=D, scale=100.0,
    )  # fmt: skip
    return evaluate_batches(encoders, batches, class_names, templates)


def torch_tokenizer(texts):
    return torch.from_numpy(make_clip_tokenizer()(texts))


def test_class_embeddings():
    from open_clip import build_zero_shot_classifier

    theirs = build_zero_shot_classifier(ENCODER, torch_tokenizer, NAMES, TEMPLATES)
    ours = class_embeddings(
        encode_text, make_clip_tokenizer(), NAMES, TEMPLATES, batch_size=8, context_length=77
    )
    # Unit vectors in float32, summed in another order.
    np.testing.assert_allclose(ours, theirs.T.numpy(), atol=1e-6)


# scikit-learn says that some classes have no image; both leave them out of the mean.
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("num_classes", [3, 6])
def test_zero_shot_metrics(num_classes, monkeypatch):
    from clip_benchmark.metrics import zeroshot_classification

    # CLIP_benchmark 1.6.2 calls float() on arrays of one element, which numpy 2.4 refuses.
    def to_float(value):
        return float(np.asarray(value).item())

    monkeypatch.setattr(zeroshot_classification, "float", to_float, raising=False)
    rng = np.random.default_rng(num_classes)
    names = NAMES[:num_classes]
    images = rng.integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    # The last class has no image at all.
    labels = rng.integers(0, num_classes - 1, 50).astype(np.int32)

    class Data(torch.utils.data.Dataset):
        classes = names

        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return images[i], int(labels[i])

    loader = torch.utils.data.DataLoader(Data(), batch_size=16)
    theirs = zeroshot_classification.evaluate(
        ENCODER,
        loader,
        torch_tokenizer,
        names,
        [t.replace("{}", "{c}") for t in TEMPLATES],
        "cpu",
        amp=False,
    )
    batches = [
        {
            "image": images[i : i + 16],
            "label": labels[i : i + 16],
            "captions": [[]] * 16,
            "key": [""] * 16,
            "valid": np.ones(16, bool)[: 50 - i],
        }
        for i in range(0, 50, 16)
    ]
    (result,) = evaluate(batches, names, TEMPLATES).results
    assert set(result["metrics"]) == set(theirs) | {"calibration_error"}
    for name, value in theirs.items():
        assert result["metrics"][name] == pytest.approx(value, nan_ok=True)


def test_retrieval_metrics():
    from clip_benchmark.metrics import zeroshot_retrieval

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    texts = [[f"text {i} {j} {rng.integers(99)}" for j in range(1 + i % 3)] for i in range(40)]
    batches = [(torch.from_numpy(images[i : i + 16]), texts[i : i + 16]) for i in range(0, 40, 16)]
    theirs = zeroshot_retrieval.evaluate(
        ENCODER, batches, torch_tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    flat = [text for of_image in texts for text in of_image]
    image_of_text = np.repeat(np.arange(40), [len(of_image) for of_image in texts])
    unit = torch.nn.functional.normalize
    with torch.no_grad():
        z_image = unit(ENCODER.encode_image(torch.from_numpy(images)), dim=-1).numpy()
        z_text = unit(ENCODER.encode_text(torch_tokenizer(flat)), dim=-1).numpy()
    ranks = retrieval_ranks(z_image, z_text, image_of_text, captions=None)
    assert recalls(ranks) == pytest.approx(theirs)

    # Through the whole evaluation, padded batches and all; these captions are all different.
    padded = [
        {
            "image": np.pad(images[i : i + 16], ((0, max(0, i - 24)), (0, 0), (0, 0), (0, 0))),
            "captions": texts[i : i + 16] + [[]] * max(0, i - 24),
            "label": np.full(16, -1),
            "key": [""] * 16,
            "valid": np.arange(i, i + 16) < 40,
        }
        for i in range(0, 40, 16)
    ]
    (result,) = evaluate(padded, [], []).results
    assert result["metrics"] == pytest.approx(theirs)


@pytest.mark.parametrize("c", [0.316, 30.0])
def test_linear_probe(c):
    from sklearn.linear_model import LogisticRegression

    from clip_jax.evaluation.linear_probe import fit

    rng = np.random.default_rng(0)
    label = rng.integers(10, size=4000)
    z = 2 + rng.normal(size=(10, 32))[label] + 2.5 * rng.normal(size=(4000, 32))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    ours = fit(z[:2000], label[:2000], num_classes=10, c=c, tolerance=1e-6)
    theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(
        z[:2000].astype(np.float64), label[:2000]
    )
    expected = theirs.decision_function(z[2000:])
    # Logits up to 10 of float32 sums, at a minimum that is known to a gradient of 1e-6.
    logits = ours.logits(z[2000:])
    centered = [x - x.mean(axis=1, keepdims=True) for x in (logits, expected)]
    np.testing.assert_allclose(*centered, atol=1e-2)
    # Far enough from sure that a wrong probe would show.
    accuracy = (logits.argmax(axis=1) == label[2000:]).mean()
    assert 0.3 < accuracy < 0.95
    assert abs(accuracy - theirs.score(z[2000:], label[2000:])) <= 0.002
