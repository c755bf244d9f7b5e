"""From sample ids to rows: read, decode, transform, tokenize. Never raises for bad data."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8, UInt32
from PIL import Image

from clip_jax.data.augment import make_decode, make_transform
from clip_jax.data.captions import (
    CaptionKind,
    choose_caption,
    choose_negative,
    drop_words,
    parse_captions,
)
from clip_jax.data.dataset import LazyShard
from clip_jax.data.decode_watch import DecodeWatch, Progress
from clip_jax.data.images import MAX_PIXELS, Chance, Preprocess, decode_image, eval_transform
from clip_jax.data.order import AUGMENT_KEY, NEGATIVE_KEY, WORDS_KEY, Uniforms
from clip_jax.data.patches import ImageSize, PatchShape, image_shape
from clip_jax.data.shards import (
    PROGRAMMING_ERRORS,
    BadSampleError,
    ConcatShards,
    Handles,
    Shard,
    sample_cause,
)
from clip_jax.errors import UserError
from clip_jax.sections import DataSection
from clip_jax.typing import Tokenizer

ImageTransform = Callable[[Image.Image, Chance], UInt8[np.ndarray, "H W 3"]]
Decode = Callable[[bytes], Image.Image]


@dataclass(frozen=True)
class SampleShape:
    """The size of a model's inputs: an image's side or patches, and a caption's tokens."""

    image_size: ImageSize
    context_length: int

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape of the array of one image."""
        return image_shape(self.image_size)

    @property
    def side(self) -> int:
        """The side of the square images that a model is trained on, pixels."""
        if isinstance(self.image_size, PatchShape):
            raise UserError("this model takes patches: it is not trained on squares here")
        return self.image_size


@dataclass(frozen=True)
class Decoding:
    """The functions that make what decodes bytes, and what crops an image, of side and config.

    Processes that decode get them by name, so they are functions of a module.
    """

    make_decode: Callable[[int, DataSection], Decode] = make_decode
    make_transform: Callable[[int, DataSection], ImageTransform] = make_transform


DECODING = Decoding()


@dataclass(frozen=True)
class ReaderSettings:
    """All that a reader of training data needs but the shards, for this process or another."""

    tokenizer: Tokenizer
    shape: SampleShape
    config: DataSection
    seed: int
    decoding: Decoding = DECODING


@dataclass
class Negatives:
    """The texts of a run of rows that their images do not show; of rows without one no `valid`."""

    text: Int32[np.ndarray, "rows L"]
    caption_id: UInt32[np.ndarray, " rows"]
    valid: Bool[np.ndarray, " rows"]


@dataclass
class Rows:
    """A run of rows on its way from a thread to a batch; opaque to Grain's tree functions.

    The fields are those of `loader.Batch`, and `skipped` holds (cause, key, details) for
    every sample that could not be used. Labels and captions are evaluation's alone, negatives
    those of training that has some.
    """

    image: UInt8[np.ndarray, "rows H W 3"]
    text: Int32[np.ndarray, "rows L"]
    caption_id: UInt32[np.ndarray, " rows"]
    valid: Bool[np.ndarray, " rows"]
    key: list[str]
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    label: Int32[np.ndarray, " rows"] | None = None
    captions: list[list[str]] | None = None
    negatives: Negatives | None = None


def no_negatives(text: Int32[np.ndarray, "rows L"]) -> Negatives:
    """Return the negatives of rows that have none; `text` are the tokens of none."""
    return Negatives(text, np.zeros(len(text), np.uint32), np.zeros(len(text), bool))


def joined_negatives(parts: Sequence[Rows]) -> Negatives | None:
    """Return the negatives of runs of rows, one after the other; None where they have none."""
    negatives = [part.negatives for part in parts if part.negatives is not None]
    if not negatives:
        return None
    return Negatives(
        np.concatenate([n.text for n in negatives]),
        np.concatenate([n.caption_id for n in negatives]),
        np.concatenate([n.valid for n in negatives]),
    )


class SampleReader:
    """Reads rows of training or evaluation data. Threads share it: only its cache changes.

    Args:
      shards: their samples are what the ids count.
      tokenizer: called from several threads.
      shape: of the rows.
      decode: bytes -> an image; what it gives must depend on the bytes alone.
      transform: (image, rng) -> uint8, of the shape's `image`.
      seed: with epoch and sample id it fixes a row's chance, whoever reads it.
      cache_bytes: memory for decoded images.
      seconds: that decoding an image may take; then its sample counts as one that cannot be read.
      kinds: of captions, of which each sample's is one; empty takes those that a source has.
      word_dropout: the share of a caption's words that are left out.
      negatives: the kind of texts that are negatives alone, of which each sample has one; "" none.
      evaluation: read labels, take the first caption, and do without one where there is a label.
      need_captions: False does without a caption everywhere.
    """

    def __init__(
        self,
        shards: ConcatShards,
        tokenizer: Tokenizer,
        shape: SampleShape,
        *,
        decode: Decode,
        transform: ImageTransform,
        seed: int,
        cache_bytes: int,
        seconds: float,
        kinds: Sequence[CaptionKind] = (),
        word_dropout: float = 0.0,
        negatives: str = "",
        evaluation: bool = False,
        need_captions: bool = True,
    ):
        self.evaluation = evaluation
        self._need_captions = need_captions
        self._kinds, self._word_dropout, self._negatives = kinds, word_dropout, negatives
        self._shards = shards
        self._tokenizer = tokenizer
        self._shape = shape
        self._decode = decode
        self._transform = transform
        self._seed = seed
        self._cache = _ImageCache(cache_bytes)
        self._watch = DecodeWatch(seconds)
        self._hung: set[int] = set()

    def close(self) -> None:
        """Wait for no image any more that hangs."""
        self._watch.close()

    def read(
        self,
        ids: Int64[np.ndarray, " rows"],
        epochs: Int64[np.ndarray, " rows"],
        image: UInt8[np.ndarray, "rows H W 3"] | None = None,
        *,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Rows:
        """Return the rows of these samples in these epochs; an id of -1 is padding.

        Args:
          ids, epochs: one for each row.
          image: where the images go, if not into memory of their own.
          is_wanted: whether anybody waits for the rows; asked where an image takes long.
        """
        n, length = len(ids), self._shape.context_length
        rows = Rows(
            image=np.empty((n, *self._shape.image), np.uint8) if image is None else image,
            text=np.empty((n, length), np.int32),
            caption_id=np.zeros(n, np.uint32),
            valid=np.zeros(n, bool),
            key=[""] * n,
        )
        if self.evaluation:
            rows.label, rows.captions = np.full(n, -1, np.int32), [[] for _ in range(n)]
        texts = [""] * n
        places = [
            (sample, epoch, *place)
            for sample, epoch, place in zip(
                ids.tolist(), epochs.tolist(), self._shards.places(ids), strict=True
            )
        ]
        first = 0
        while first < n:

            def read_rows(progress: Progress, first: int = first) -> None:
                self._read_rows(rows, texts, places, first, progress)

            hung = self._watch.run(read_rows, is_wanted)
            if hung >= 0:
                self._hung.add(places[hung][0])
                rows.skipped.append(self._hung_cause(rows.key[hung]))
            first = n if hung < 0 else hung + 1
        if not rows.valid.all():
            rows.image[~rows.valid] = 0
        rows.text = self._tokenizer(texts, length)
        if self._negatives:
            rows.negatives = self._read_negatives(rows, places)
        return rows

    def _read_negatives(self, rows: Rows, places: Sequence[tuple[int, int, int, int]]) -> Negatives:
        """Return a negative of each row that can be used and has one; `places` as `_read_rows`."""
        rng, texts = Uniforms(self._seed, NEGATIVE_KEY), [""] * len(places)
        caption_ids, valid = np.zeros(len(places), np.uint32), np.zeros(len(places), bool)
        with Handles() as handles:
            for row in np.flatnonzero(rows.valid).tolist():
                sample, epoch, number, i = places[row]
                rng.move(sample, epoch)
                shard, _ = self._open(number)
                texts[row] = choose_negative(shard, self._negatives, i, handles, rng.random())
                if texts[row]:
                    valid[row] = True
                    caption_ids[row] = caption_id(texts[row])
        return Negatives(self._tokenizer(texts, self._shape.context_length), caption_ids, valid)

    def _read_rows(
        self,
        rows: Rows,
        texts: list[str],
        places: Sequence[tuple[int, int, int, int]],
        first: int,
        progress: Progress,
    ) -> None:
        """Read the rows from `first` on; `places` are (sample, epoch, shard, number in it)."""
        rng, word_rng = Uniforms(self._seed, AUGMENT_KEY), Uniforms(self._seed, WORDS_KEY)
        opened: dict[int, tuple[Shard, str]] = {}
        with Handles(reads_images=True) as handles:
            for row in range(first, len(places)):
                sample, epoch, number, i = places[row]
                if sample < 0:
                    continue
                if number not in opened:
                    opened[number] = self._open(number)
                shard, name = opened[number]
                rows.key[row] = f"{name}/{shard.key(i)}"
                if sample in self._hung:
                    rows.skipped.append(self._hung_cause(rows.key[row]))
                    continue
                rng.move(sample, epoch)
                texts[row] = self._read_row(rows, row, sample, shard, i, rng, handles, progress)
                if self._word_dropout:
                    word_rng.move(sample, epoch)
                    texts[row] = drop_words(texts[row], self._word_dropout, word_rng)

    def _hung_cause(self, key: str) -> tuple[str, str, str]:
        seconds = self._watch.seconds
        return "decode_hung", key, f"decoding had not ended after {seconds:g} s; the thread is left"

    def _open(self, number: int) -> tuple[Shard, str]:
        """Return a shard, and its name: looked up once for a run of rows."""
        shard = self._shards.shards[number]
        if isinstance(shard, LazyShard):
            shard = shard.load()
        return shard, shard.name

    def _read_row(
        self,
        rows: Rows,
        row: int,
        sample: int,
        shard: Shard,
        i: int,
        rng: Chance,
        handles: Handles,
        progress: Progress,
    ) -> str:
        """Fill one row and return its caption; a fault of the data becomes `valid=False`."""
        try:
            label = shard.label(i, handles) if self.evaluation else -1
            optional = label >= 0 or not self._need_captions
            # Drawn even for one caption, so that a crop does not depend on their number.
            chance = 0.0 if self.evaluation else rng.random()
            if self._kinds:
                captions = [choose_caption(shard, self._kinds, i, handles, chance)]
            else:
                captions = _captions(shard, i, handles, optional=optional)
            caption = captions[int(chance * len(captions))] if captions else ""
            image = self._cache.get(sample)
            data = shard.image(i, handles) if image is None else b""
            progress.begin(row)
            try:
                if image is None:
                    image = self._decode(data)
                    self._cache.put(sample, image)
                image_HWC = self._transform(image, rng)
            finally:
                progress.end()
        except PROGRAMMING_ERRORS:
            raise
        except Exception as e:
            # The libraries that read records and tables have types of their own.
            rows.skipped.append((sample_cause(e), rows.key[row], str(e)))
            return ""
        rows.image[row] = image_HWC
        rows.valid[row] = True
        if rows.label is not None and rows.captions is not None:
            rows.label[row], rows.captions[row] = label, captions
        if caption:
            rows.caption_id[row] = caption_id(caption)
        return caption


def make_training_reader(settings: ReaderSettings, shards: ConcatShards) -> SampleReader:
    """Make the reader of training data, whose decoder and crops are the config's."""
    shape, config = settings.shape, settings.config
    return SampleReader(
        shards,
        settings.tokenizer,
        shape,
        decode=settings.decoding.make_decode(shape.side, config),
        transform=settings.decoding.make_transform(shape.side, config),
        seed=settings.seed,
        cache_bytes=config.cache_bytes,
        seconds=config.decode_seconds,
        kinds=parse_captions(config.captions),
        word_dropout=config.word_dropout,
        negatives=config.negatives,
    )


def make_eval_reader(
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    shape: SampleShape,
    preprocess: Preprocess,
    *,
    need_captions: bool = True,
) -> SampleReader:
    """Make the reader of evaluation data: whole images through `images.eval_transform`."""
    return SampleReader(
        ConcatShards(shards),
        tokenizer,
        shape,
        decode=lambda data: decode_image(data, max_pixels=MAX_PIXELS),
        transform=lambda image, rng: eval_transform(
            image, shape.image_size, preprocess, max_pixels=MAX_PIXELS
        ),
        seed=0,  # nothing is drawn
        cache_bytes=0,
        seconds=DataSection.decode_seconds,
        evaluation=True,
        need_captions=need_captions,
    )


class _ImageCache:
    """Decoded images up to a number of bytes, then no more.

    An epoch visits every image once, so what is evicted would have been as useful as what
    replaces it: keeping the first comers is as good as any policy, and the simplest.
    """

    def __init__(self, limit: int):
        self._free = limit
        self._images: dict[int, Image.Image] = {}
        self._lock = threading.Lock()

    def get(self, sample: int) -> Image.Image | None:
        """Return the image of a sample, if it is there."""
        return self._images.get(sample)

    def put(self, sample: int, image: Image.Image) -> None:
        """Keep the image of a sample, if there is room."""
        if not self._free:
            return
        # Pillow stores every image of several bands with four bytes a pixel.
        size = image.width * image.height * (4 if len(image.getbands()) > 1 else 1)
        with self._lock:
            if size <= self._free and sample not in self._images:
                # A copy, to leave the reader and the file's bytes behind.
                self._images[sample] = image.copy()
                self._free -= size


def _captions(shard: Shard, i: int, handles: Handles, *, optional: bool) -> list[str]:
    try:
        return shard.captions(i, handles)
    except BadSampleError as e:
        if optional and e.cause in ("no_caption", "empty_caption"):
            return []
        raise


def caption_id(caption: str) -> int:
    """Return 32 bits of BLAKE2b, the same on every host: equal captions meet across hosts."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=4).digest(), "little")
