"""Which images, captions and classes of an evaluation are worth looking at."""

import importlib.util
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from clip_jax.evaluation.feature_store import FeatureSet

# Images whose nearest captions are looked for: more would show no more.
MOST_SEARCHED = 2000
NEIGHBOURS = 15
"""Of an image on UMAP's map; its own default."""


class Batch(NamedTuple):
    """Images down, their captions across: cosines [n, n]."""

    places: Int[np.ndarray, " n"]
    captions: list[str]
    cosines: Float[np.ndarray, "n n"]


class Query(NamedTuple):
    """A caption, the places of its nearest images, their cosines, and which are right."""

    caption: str
    places: list[int]
    cosines: list[float]
    right: list[bool]


class Miss(NamedTuple):
    """An image whose nearest caption is not its own."""

    place: int
    caption: str
    cosine: float
    nearest: str
    nearest_cosine: float


def captions_of(features: FeatureSet) -> list[str]:
    """The first caption of each image; empty where it has none."""
    found = [""] * len(features)
    for text in range(len(features.captions) - 1, -1, -1):
        found[int(features.image_of_text[text])] = str(features.captions[text])
    return found


def similarity_batch(features: FeatureSet, *, size: int = 10, seed: int = 0) -> Batch:
    """Some images with different captions, and the cosines of all with all."""
    texts = np.random.default_rng(seed).permutation(len(features.captions))
    chosen: dict[str, int] = {}
    for text in texts:
        chosen.setdefault(str(features.captions[text]), int(text))
        if len(chosen) == size:
            break
    rows = np.array(list(chosen.values()))
    places = features.image_of_text[rows]
    cosines = features.z_image_BD[places] @ features.z_text_BD[rows].T
    return Batch(places, list(chosen), cosines)


def gallery(
    features: FeatureSet, *, queries: int = 8, nearest: int = 10, seed: int = 1
) -> list[Query]:
    """Some captions, each with the images nearest to it among all."""
    texts = np.random.default_rng(seed).permutation(len(features.captions))
    found: dict[str, Query] = {}
    for text in texts:
        caption = str(features.captions[text])
        if caption in found:
            continue
        cosine_B = features.z_image_BD @ features.z_text_BD[text]
        places = np.argsort(-cosine_B, kind="stable")[:nearest]
        own = {
            int(i)
            for i, c in zip(features.image_of_text, features.captions, strict=True)
            if str(c) == caption
        }
        right = [int(place) in own for place in places]
        found[caption] = Query(caption, places.tolist(), cosine_B[places].tolist(), right)
        if len(found) == queries:
            break
    return list(found.values())


def nearest_wrong(features: FeatureSet, *, count: int = 12, seed: int = 2) -> list[Miss]:
    """The images that prefer a wrong caption to their own by the most, among a sample."""
    own = captions_of(features)
    places = np.array([i for i, caption in enumerate(own) if caption])
    places = np.random.default_rng(seed).permutation(places)[:MOST_SEARCHED]
    misses = []
    for place in places:
        cosine = features.z_text_BD @ features.z_image_BD[place]
        theirs = {
            str(c) for c in (features.captions[t] for t in np.flatnonzero(
                features.image_of_text == place
            ))
        }  # fmt: skip
        best_own = max(float(cosine[t]) for t in np.flatnonzero(features.image_of_text == place))
        best = int(cosine.argmax())
        if str(features.captions[best]) not in theirs:
            nearest = str(features.captions[best])
            misses.append(Miss(int(place), own[place], best_own, nearest, float(cosine[best])))
    return sorted(misses, key=lambda m: m.cosine - m.nearest_cosine)[:count]


class Worst(NamedTuple):
    """The classes with the lowest recall, and where their images' probability goes.

    Attributes:
      places: an image of each class.
      shares: mean probability of `columns` for the images of each class [n, columns].
    """

    classes: list[int]
    places: list[int]
    recalls: list[float]
    images: list[int]
    columns: list[int]
    shares: Float[np.ndarray, "n columns"]


def worst_classes(
    features: FeatureSet, class_MD: Float32[np.ndarray, "M D"], scale: float, *, count: int = 10
) -> Worst:
    """The classes the model names worst, by recall and then by the probability of the truth."""
    label_B = features.label_B
    known = np.flatnonzero(label_B >= 0)[: 4 * MOST_SEARCHED]
    shares_bM = _softmax(scale * features.z_image_BD[known] @ class_MD.T)
    label_b = label_B[known]
    images_M = np.bincount(label_b, minlength=len(class_MD))
    right_M = np.bincount(label_b[shares_bM.argmax(1) == label_b], minlength=len(class_MD))
    truth_b = shares_bM[np.arange(len(known)), label_b]
    truth_M = np.bincount(label_b, truth_b, len(class_MD)) / np.maximum(images_M, 1)
    present = np.flatnonzero(images_M)
    recall_M = right_M / np.maximum(images_M, 1)
    order = np.lexsort((truth_M[present], recall_M[present]))
    classes = present[order[:count]]
    mean_nM = np.stack([shares_bM[label_b == m].mean(axis=0) for m in classes])
    rivals = list(dict.fromkeys(int(row.argmax()) for row in mean_nM))
    columns = rivals[:count]
    return Worst(
        classes.tolist(),
        [int(known[np.flatnonzero(label_b == m)[0]]) for m in classes],
        recall_M[classes].tolist(),
        images_M[classes].tolist(),
        columns,
        mean_nM[:, columns],
    )


def _softmax(logits_bM: np.ndarray) -> np.ndarray:
    shares_bM = np.exp(logits_bM - logits_bM.max(axis=1, keepdims=True))
    return shares_bM / shares_bM.sum(axis=1, keepdims=True)


def flat_map(z_BD: Float32[np.ndarray, "B D"]) -> tuple[str, Float[np.ndarray, "B 2"]]:
    """Two coordinates of each feature: UMAP's where umap-learn is installed, else PCA's.

    PCA's also of so few images that each would have all the others for neighbors.
    """
    if len(z_BD) > NEIGHBOURS and importlib.util.find_spec("umap"):
        with warnings.catch_warnings():
            # It tells of an optional package, and that one seed means one thread.
            warnings.simplefilter("ignore")
            import umap

            reducer = umap.UMAP(
                n_neighbors=NEIGHBOURS, min_dist=0.2, metric="cosine", random_state=0, n_jobs=1
            )
            return f"UMAP, {NEIGHBOURS} neighbors by cosine", reducer.fit_transform(z_BD)
    centred_BD = z_BD - z_BD.mean(axis=0)
    values_D, turn_DD = np.linalg.eigh(centred_BD.T @ centred_BD)
    kept = values_D[-2:].sum() / max(float(values_D.sum()), 1e-12)
    # The sign of an axis is chance; the larger tail goes right and down.
    flat_B2 = centred_BD @ turn_DD[:, [-1, -2]]
    flat_B2 *= np.sign((flat_B2**3).sum(axis=0)) + (flat_B2.sum(axis=0) == 0)
    return f"the two directions of most variance (PCA, {kept:.0%} of it)", flat_B2
