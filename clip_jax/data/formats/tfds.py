"""TFDS sets by name or folder, through `tfds.data_source`: ArrayRecord, without TensorFlow.

`tfds:coco_captions/2014#split=train` is looked for under $TFDS_DATA_DIR or ~/tensorflow_datasets.
Captions come from a text feature, or from the class names of a label.
"""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clip_jax.data.formats.errors import unreadable
from clip_jax.data.formats.options import Options
from clip_jax.data.shards import BadSampleError, Handles, caption_values
from clip_jax.errors import UserError, short

CAPTION_FEATURES = ("caption", "captions", "text", "title", "description")


def is_tfds_folder(folder: str) -> bool:
    """Whether a folder is one prepared version of a TFDS set."""
    return all(
        os.path.isfile(os.path.join(folder, name))
        for name in ("dataset_info.json", "features.json")
    )


def find_folder(name: str) -> str:
    """The folder of a prepared set: a folder as it is, or NAME[/CONFIG][:VERSION].

    Raises:
      UserError: it is not there, or holds several configs and none is named.
    """
    if is_tfds_folder(os.path.expanduser(name)):
        return os.path.expanduser(name)
    data_dir = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    set_name, _, version = name.partition(":")
    base = os.path.join(data_dir, set_name)
    found = [f for f in glob.glob(f"{glob.escape(base)}/**/", recursive=True) if is_tfds_folder(f)]
    found = [f.rstrip("/") for f in found]
    if version:
        found = [f for f in found if os.path.basename(f) == version]
    configs = sorted({os.path.dirname(f) for f in found})
    if len(configs) > 1:
        names = ", ".join(os.path.relpath(c, data_dir) for c in configs)
        raise UserError(f"tfds:{name} has several configs: name one of {names}")
    if not found:
        raise UserError(
            f"tfds:{name} is not prepared in {data_dir}; run `tfds build {set_name}"
            " --file_format=array_record` where it can be downloaded, or set TFDS_DATA_DIR"
        )
    return max(found, key=lambda f: [int(n) for n in re.findall(r"\d+", os.path.basename(f))])


class TfdsShard:
    """One split of a TFDS set; its images stay encoded."""

    def __init__(self, name: str, source: Any, features: Any, size: int, options: Options):
        self.name, self.size = name, size
        self._source, self._features = source, features
        self._image = _feature(features, options.image, ("image",), name, "image")
        self._label = _label_feature(features, options.label)
        self._caption = options.caption or _caption_feature(features)
        if not self._caption and not self._label:
            raise UserError(
                f"{name} has neither a text feature nor class names among {', '.join(features)}:"
                " name one, #caption=FEATURE"
            )

    def __len__(self) -> int:
        return len(self._source)

    def key(self, i: int) -> str:
        """The example's number in the split."""
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

    def captions(self, i: int, handles: Handles) -> list[str]:
        if self._caption:
            value: Any = self._example(i, handles)
            for part in self._caption.split("/"):
                value = value[part]
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
        example = self._example(i, handles)
        plain = {
            k: v.item() if hasattr(v, "item") and v.ndim == 0 else v for k, v in example.items()
        }
        return {k: v for k, v in plain.items() if isinstance(v, int | float | str)}

    def incomplete(self) -> dict[str, list[str]]:
        return {}


def _feature(features: Any, wanted: str, usual: tuple[str, ...], name: str, what: str) -> str:
    for candidate in [wanted] if wanted else usual:
        if candidate in features:
            return candidate
    raise UserError(
        f"{name} has no feature {wanted or usual[0]!r} for the {what}; it has"
        f" {', '.join(features)}: #{what}=FEATURE"
    )


def _label_feature(features: Any, wanted: str) -> str:
    if wanted:
        return wanted
    names = [n for n, f in features.items() if type(f).__name__ == "ClassLabel"]
    return "label" if "label" in names else next(iter(names), "")


def _caption_feature(features: Any) -> str:
    """The first text feature with a usual name, also inside a sequence (`captions/text`)."""
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
    """One split of a prepared set.

    Raises:
      ShardError: tfds cannot read it: a format without random access, or no such split.
      UserError: the set is not there.
    """
    name = path.removeprefix("tfds:")
    folder = find_folder(name)
    import tensorflow_datasets as tfds

    with _tfds_errors(name, folder):
        builder = tfds.builder_from_directory(folder)
    features = builder.info.features
    decoders = {
        n: tfds.decode.SkipDecoding() for n, f in features.items() if type(f).__name__ == "Image"
    }
    with _tfds_errors(name, folder):
        source = builder.as_data_source(split=options.split, decoders=decoders)
        size = builder.info.splits[options.split].num_bytes
    shown = f"tfds:{name if name[:1] != '/' else os.path.basename(folder)}#{options.split}"
    return TfdsShard(shown, source, features, int(size), options)


@contextmanager
def _tfds_errors(name: str, folder: str) -> Iterator[None]:
    """Turn whatever a call of tfds raises into a ShardError: types of its own and of others, with
    pages of text."""
    try:
        yield
    except Exception as e:
        raise unreadable(
            e,
            f"tfds:{name} ({folder}) cannot be read: {short(e)[:300]}; it takes a split of the set"
            " and --file_format=array_record",
        ) from e
