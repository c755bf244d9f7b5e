"""Select the images, captions and classes of an evaluation that a report shows."""

import importlib.util
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from clip_jax.evaluation.features import FeatureSet
from clip_jax.report_page.load_run import Run

# Images that are searched for examples: more would show no more.
MAX_SEARCHED = 2000
MAP_IMAGES = 150
"""On the map, about."""
UMAP_NEIGHBORS = 15
"""Of an image on UMAP's map; its own default."""


class SimilarityBatch(NamedTuple):
    """Cosines [n, n] of images, downwards, with their captions, across."""

    positions: Int[np.ndarray, " n"]
    captions: list[str]
    cosines: Float[np.ndarray, "n n"]


class CaptionQuery(NamedTuple):
    """A caption, the positions of its nearest images, their cosines, and which are right."""

    caption: str
    positions: list[int]
    cosines: list[float]
    right: list[bool]


class WrongCaption(NamedTuple):
    """An image whose nearest caption is another image's."""

    position: int
    caption: str
    cosine: float
    nearest: str
    nearest_cosine: float


class WorstClasses(NamedTuple):
    """The classes with the lowest recall, and where their images' probability goes.

    Attributes:
      positions: an image of each class.
      images: how many each class has.
      shares: mean probability of the classes `columns` for the images of each class [n, columns].
    """

    classes: list[int]
    positions: list[int]
    recalls: list[float]
    images: list[int]
    columns: list[int]
    shares: Float[np.ndarray, "n columns"]


class ImageMap(NamedTuple):
    """Images on a plane.

    Attributes:
      method: how the plane was found, in words.
      positions, xy: the images that are shown, and where.
    """

    method: str
    positions: list[int]
    xy: Float[np.ndarray, "n 2"]


class Examples(NamedTuple):
    """The images, captions and classes of a run that its report shows.

    `batch` is None and `queries` and `wrong_captions` are empty where no image has a caption;
    `worst` is None where nothing was classified.
    """

    batch: SimilarityBatch | None
    queries: list[CaptionQuery]
    wrong_captions: list[WrongCaption]
    worst: WorstClasses | None
    map: ImageMap

    def positions(self) -> set[int]:
        """Return the positions of all images that are shown."""
        positions = {*self.map.positions, *(w.position for w in self.wrong_captions)}
        positions.update(p for query in self.queries for p in query.positions)
        if self.batch is not None:
            positions.update(self.batch.positions.tolist())
        if self.worst is not None:
            positions.update(self.worst.positions)
        return positions


def select_examples(run: Run) -> Examples:
    """Select what to show of a run whose features are kept."""
    features = run.features
    assert features is not None
    has_captions = len(features.captions) > 0
    worst = None
    if run.class_MD is not None:
        worst = worst_classes(features, run.class_MD, run.evaluation["scale"])
    return Examples(
        similarity_batch(features) if has_captions else None,
        caption_queries(features) if has_captions else [],
        wrong_captions(features) if has_captions else [],
        worst,
        image_map(features),
    )


def first_captions(features: FeatureSet) -> list[str]:
    """Return the first caption of each image; empty where it has none."""
    captions = [""] * len(features)
    for text in range(len(features.captions) - 1, -1, -1):
        captions[int(features.image_of_text[text])] = str(features.captions[text])
    return captions


def similarity_batch(features: FeatureSet, *, size: int = 10, seed: int = 0) -> SimilarityBatch:
    """Draw some images with different captions, and compute the cosines of all with all."""
    texts = np.random.default_rng(seed).permutation(len(features.captions))
    text_of_caption: dict[str, int] = {}
    for text in texts:
        text_of_caption.setdefault(str(features.captions[text]), int(text))
        if len(text_of_caption) == size:
            break
    rows = np.array(list(text_of_caption.values()))
    positions = features.image_of_text[rows]
    cosines = features.z_image_BD[positions] @ features.z_text_BD[rows].T
    return SimilarityBatch(positions, list(text_of_caption), cosines)


def caption_queries(
    features: FeatureSet, *, count: int = 8, nearest: int = 10, seed: int = 1
) -> list[CaptionQuery]:
    """Draw some captions, each with the images nearest to it among all."""
    texts = np.random.default_rng(seed).permutation(len(features.captions))
    queries: dict[str, CaptionQuery] = {}
    for text in texts:
        caption = str(features.captions[text])
        if caption in queries:
            continue
        cosine_B = features.z_image_BD @ features.z_text_BD[text]
        positions = np.argsort(-cosine_B, kind="stable")[:nearest]
        captioned = {
            int(i)
            for i, c in zip(features.image_of_text, features.captions, strict=True)
            if str(c) == caption
        }
        right = [int(position) in captioned for position in positions]
        cosines = cosine_B[positions].tolist()
        queries[caption] = CaptionQuery(caption, positions.tolist(), cosines, right)
        if len(queries) == count:
            break
    return list(queries.values())


def wrong_captions(features: FeatureSet, *, count: int = 12, seed: int = 2) -> list[WrongCaption]:
    """Find the images that prefer a wrong caption to their own by the most, among a sample."""
    captions = first_captions(features)
    positions = np.array([i for i, caption in enumerate(captions) if caption])
    positions = np.random.default_rng(seed).permutation(positions)[:MAX_SEARCHED]
    wrong = []
    for position in positions:
        cosine = features.z_text_BD @ features.z_image_BD[position]
        texts = np.flatnonzero(features.image_of_text == position)
        right = {str(features.captions[text]) for text in texts}
        best_right = max(float(cosine[text]) for text in texts)
        best = int(cosine.argmax())
        nearest = str(features.captions[best])
        if nearest not in right:
            caption = captions[position]
            wrong.append(
                WrongCaption(int(position), caption, best_right, nearest, float(cosine[best]))
            )
    return sorted(wrong, key=lambda w: w.cosine - w.nearest_cosine)[:count]


def worst_classes(
    features: FeatureSet, class_MD: Float32[np.ndarray, "M D"], scale: float, *, count: int = 10
) -> WorstClasses:
    """Find the classes the model names worst, by recall and then by the truth's probability."""
    label_B = features.label_B
    labeled = np.flatnonzero(label_B >= 0)[: 4 * MAX_SEARCHED]
    share_bM = _softmax(scale * features.z_image_BD[labeled] @ class_MD.T)
    label_b = label_B[labeled]
    images_M = np.bincount(label_b, minlength=len(class_MD))
    right_M = np.bincount(label_b[share_bM.argmax(1) == label_b], minlength=len(class_MD))
    truth_b = share_bM[np.arange(len(labeled)), label_b]
    truth_M = np.bincount(label_b, truth_b, len(class_MD)) / np.maximum(images_M, 1)
    present = np.flatnonzero(images_M)
    recall_M = right_M / np.maximum(images_M, 1)
    order = np.lexsort((truth_M[present], recall_M[present]))
    classes = present[order[:count]]
    mean_nM = np.stack([share_bM[label_b == m].mean(axis=0) for m in classes])
    columns = list(dict.fromkeys(int(row.argmax()) for row in mean_nM))[:count]
    return WorstClasses(
        classes.tolist(),
        [int(labeled[np.flatnonzero(label_b == m)[0]]) for m in classes],
        recall_M[classes].tolist(),
        images_M[classes].tolist(),
        columns,
        mean_nM[:, columns],
    )


def _softmax(logits_bM: np.ndarray) -> np.ndarray:
    share_bM = np.exp(logits_bM - logits_bM.max(axis=1, keepdims=True))
    return share_bM / share_bM.sum(axis=1, keepdims=True)


def image_map(features: FeatureSet) -> ImageMap:
    """Place some images on the plane of many."""
    method, xy_B2 = flatten(features.z_image_BD[:MAX_SEARCHED])
    positions = list(range(0, len(xy_B2), max(1, len(xy_B2) // MAP_IMAGES)))
    return ImageMap(method, positions, xy_B2[positions])


def flatten(z_BD: Float32[np.ndarray, "B D"]) -> tuple[str, Float[np.ndarray, "B 2"]]:
    """Return the method in words, and two coordinates of each feature.

    They are UMAP's where umap-learn is installed, else PCA's; PCA's also of so few images that
    each would have all the others for neighbors.
    """
    if len(z_BD) > UMAP_NEIGHBORS and importlib.util.find_spec("umap"):
        with warnings.catch_warnings():
            # It warns of an optional package, and that one seed means one thread.
            warnings.simplefilter("ignore")
            import umap

            reducer = umap.UMAP(
                n_neighbors=UMAP_NEIGHBORS, min_dist=0.2, metric="cosine", random_state=0, n_jobs=1
            )
            return f"UMAP, {UMAP_NEIGHBORS} neighbors by cosine", reducer.fit_transform(z_BD)
    centered_BD = z_BD - z_BD.mean(axis=0)
    values_D, turn_DD = np.linalg.eigh(centered_BD.T @ centered_BD)
    explained = values_D[-2:].sum() / max(float(values_D.sum()), 1e-12)
    # The sign of an axis is chance; the larger tail goes right and down.
    xy_B2 = centered_BD @ turn_DD[:, [-1, -2]]
    xy_B2 *= np.sign((xy_B2**3).sum(axis=0)) + (xy_B2.sum(axis=0) == 0)
    return f"the two directions of most variance (PCA, {explained:.0%} of it)", xy_B2
