"""TFDS sets by name or folder, through `tfds.data_source`: ArrayRecord, without TensorFlow.

`tfds:coco_captions/2014#split=train` is looked for under $TFDS_DATA_DIR or ~/tensorflow_datasets.
Captions come from a text feature, or from the class names of a label.
"""

import glob
import os
import re
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from clip_jax.data.formats.errors import unreadable
from clip_jax.data.formats.options import Options
from clip_jax.data.shards import BadSampleError, Handles, caption_values, hash_image
from clip_jax.errors import UserError, short

# tfds imports its parts when they are first used, under locks of its own: two threads that do so
# at once may wait for each other.
_OPENING = threading.Lock()

CAPTION_FEATURES = ("caption", "captions", "text", "title", "description")


def is_tfds_folder(folder: str) -> bool:
    """Return whether a folder is one prepared version of a TFDS set."""
    return all(
        os.path.isfile(os.path.join(folder, name))
        for name in ("dataset_info.json", "features.json")
    )


def find_folder(name: str) -> str:
    """Return the folder of a prepared set, given as a folder or as NAME[/CONFIG][:VERSION].

    Raises:
      UserError: it is not there, or holds several configs and none is named.
    """
    if is_tfds_folder(os.path.expanduser(name)):
        return os.path.expanduser(name)
    data_dir = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    set_name, _, version = name.partition(":")
    below = glob.glob(f"{glob.escape(os.path.join(data_dir, set_name))}/**/", recursive=True)
    folders = [folder.rstrip("/") for folder in below if is_tfds_folder(folder)]
    if version:
        folders = [folder for folder in folders if os.path.basename(folder) == version]
    configs = sorted({os.path.dirname(folder) for folder in folders})
    if len(configs) > 1:
        names = ", ".join(os.path.relpath(config, data_dir) for config in configs)
        raise UserError(f"tfds:{name} has several configs: name one of {names}")
    if not folders:
        raise UserError(
            f"tfds:{name} is not prepared in {data_dir}; run `tfds build {set_name}"
            " --file_format=array_record` where it can be downloaded, or set TFDS_DATA_DIR"
        )
    return max(folders, key=lambda f: [int(n) for n in re.findall(r"\d+", os.path.basename(f))])


class TfdsShard:
    """One split of a TFDS set; its images stay encoded.

    Args:
      name: for messages and keys.
      source: the split, as `tfds.data_source` gives it.
      features: the set's features by name.
      size: bytes of the split.
    """

    def __init__(self, name: str, source: Any, features: Any, size: int, options: Options):
        self.name, self.size = name, size
        self._source, self._features = source, features
        self._image = options.image or "image"
        self._label = options.label or _label_feature(features)
        self._caption = options.caption or _caption_feature(features)
        _check_feature(features, [self._image], name, "image")
        if self._label:
            _check_feature(features, [self._label], name, "label")
        if self._caption:
            _check_feature(features, self._caption.split("/"), name, "caption")
        if not self._caption and not self._label:
            raise UserError(
                f"{name} has neither a text feature nor class names among {', '.join(features)}:"
                " name one, #caption=FEATURE"
            )

    @property
    def classes(self) -> list[str]:
        """The names of the classes in label order; empty where the set has none."""
        names = getattr(self._features[self._label], "names", None) if self._label else None
        return list(names or [])

    def __len__(self) -> int:
        return len(self._source)

    def key(self, i: int) -> str:
        """Return the example's number in the split."""
        return f"{i:08d}"

    def _example(self, i: int, handles: Handles) -> dict[str, Any]:
        return handles.once((self.name, i), lambda: self._read(i))

    def _read(self, i: int) -> dict[str, Any]:
        try:
            return self._source[i]
        except Exception as e:  # tfds and array_record raise a dozen types on a damaged record
            raise BadSampleError("broken_record", short(e)) from e

    def image(self, i: int, handles: Handles) -> bytes:
        image = self._example(i, handles)[self._image]
        if not isinstance(image, bytes):
            raise BadSampleError("no_image", f"{self._image} is a {type(image).__name__}")
        return image

    def image_id(self, i: int, handles: Handles) -> Hashable:
        """Return a hash of the image's bytes: the examples of its captions hold the same."""
        return hash_image(self.image(i, handles))

    def captions(self, i: int, handles: Handles) -> list[str]:
        if self._caption:
            value: Any = self._example(i, handles)
            for name in self._caption.split("/"):
                value = value[name]
            return caption_values(value.tolist() if hasattr(value, "tolist") else value)
        label = self.label(i, handles)
        if label < 0:
            raise BadSampleError("no_caption")
        return [self._features[self._label].int2str(label).replace("_", " ")]

    def label(self, i: int, handles: Handles) -> int:
        if not self._label:
            return -1
        value = self._example(i, handles)[self._label]
        try:
            return int(value)
        except (TypeError, ValueError) as e:  # a list, or words
            raise BadSampleError("bad_label", f"{value!r:.80}") from e

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        """Return the features that are one number or text; images are left out."""
        example = self._example(i, handles)
        values = {
            k: v.item() if hasattr(v, "item") and v.ndim == 0 else v for k, v in example.items()
        }
        return {k: v for k, v in values.items() if isinstance(v, int | float | str)}

    def incomplete(self) -> dict[str, list[str]]:
        return {}


def _check_feature(features: Any, path: Sequence[str], name: str, role: str) -> None:
    """Raise UserError if there is no such feature inside the others on its path."""
    inner = features
    for part in path:
        inner = getattr(inner, "feature", inner)  # of a sequence
        if part not in getattr(inner, "keys", list)():
            raise UserError(
                f"{name} has no feature {'/'.join(path)!r} for the {role}; it has"
                f" {', '.join(features)}: #{role}=FEATURE"
            )
        inner = inner[part]


def _label_feature(features: Any) -> str:
    """Return the feature of class numbers, `label` before others; empty if there is none."""
    names = [n for n, f in features.items() if type(f).__name__ == "ClassLabel"]
    return "label" if "label" in names else next(iter(names), "")


def _caption_feature(features: Any) -> str:
    """Return the first text feature with a usual name, also inside a sequence (`captions/text`)."""
    for name in CAPTION_FEATURES:
        if name in features:
            inner = features[name]
            inner = getattr(inner, "feature", inner)
            if "text" in getattr(inner, "keys", list)():
                return f"{name}/text"
            if type(inner).__name__ == "Text":
                return name
    return ""


def open_tfds(path: str, options: Options) -> TfdsShard:
    """Open one split of a prepared set.

    Raises:
      ShardError: tfds cannot read it: a format without random access, or no such split.
      UserError: the set is not there.
    """
    name = path.removeprefix("tfds:")
    folder = find_folder(name)
    with _OPENING:
        source, info = _open_source(name, folder, options.split)
    shown = f"tfds:{name if name[:1] != '/' else os.path.basename(folder)}#{options.split}"
    size = int(info.splits[options.split].num_bytes)
    return TfdsShard(shown, source, info.features, size, options)


def _open_source(name: str, folder: str, split: str) -> tuple[Any, Any]:
    """Return a split as tfds reads it, with its images encoded, and the set's info."""
    import tensorflow_datasets as tfds

    with _tfds_errors(name, folder):
        builder = tfds.builder_from_directory(folder)
    decoders = {
        n: tfds.decode.SkipDecoding()
        for n, f in builder.info.features.items()
        if type(f).__name__ == "Image"
    }
    with _tfds_errors(name, folder):
        return builder.as_data_source(split=split, decoders=decoders), builder.info


@contextmanager
def _tfds_errors(name: str, folder: str) -> Iterator[None]:
    """Turn the error of a call of tfds, which may be of any type and pages long, into a line."""
    try:
        yield
    except Exception as e:
        raise unreadable(
            e,
            f"tfds:{name} ({folder}) cannot be read: {short(e)[:300]}; it takes a split of the set"
            " and --file_format=array_record",
        ) from e
