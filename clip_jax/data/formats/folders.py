"""A folder of images: with a caption file beside each, or one folder a class.

`a/b.jpg` with `a/b.txt` beside it is a pair (img2dataset's "files" layout). Where no image has
such a file, the folder it lies in is its class: the name is the caption, and the label its place
among the names in order.
"""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from clip_jax.data.formats.file_shard import FileShard
from clip_jax.data.formats.options import Options
from clip_jax.data.formats.remote import read_whole
from clip_jax.data.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES, image_suffix
from clip_jax.data.shards import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSampleError,
    Handles,
    caption_values,
    json_record,
    text_captions,
)
from clip_jax.errors import UserError, note

_SUFFIXES = {*IMAGE_SUFFIXES, *UNREAD_SUFFIXES}
_SPLIT = re.compile(
    r"(train(ing)?|val|valid(ation)?|test(ing)?|dev|eval|holdout)[-_ ]?(set|split|data|\d+)?"
)


def holds_images(folder: str) -> bool:
    """Return whether an image lies in the folder, at any depth."""
    return any(_images(folder, [path]) for path in _walk(folder))


def images_below(folder: str) -> list[str]:
    """Return the images in a folder at any depth, as paths from it."""
    return _images(folder, list(_walk(folder)))


def _walk(folder: str) -> Iterator[str]:
    """Yield the files below a folder, as paths from it, in name order; hidden ones are left out.

    Links to folders are followed, but not to a folder that the link lies in.
    """
    for path, folders, files in os.walk(folder, followlinks=True):
        here = os.path.join(os.path.realpath(path), "")
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and not here.startswith(os.path.join(os.path.realpath(os.path.join(path, name)), ""))
        )
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(path, name), folder)


def is_image(path: str) -> bool:
    """Return whether a file's name is an image's, also of a kind that is named and not read."""
    return path.rpartition(".")[2].lower() in _SUFFIXES


def _images(folder: str, files: Sequence[str]) -> list[str]:
    """Return the images among files: by their names, or by the first bytes where names say nothing.

    Those that cannot be read are among them: they are counted and named when they are.
    """
    return [f for f in files if is_image(f) or (_is_odd(f) and _looks_like_image(folder, f))]


def _is_odd(path: str) -> bool:
    """Return whether the name has no suffix that a file of anything has."""
    return not re.search(r"\.[a-zA-Z]\w{0,9}$", path)


def _looks_like_image(folder: str, path: str) -> bool:
    try:
        with open(os.path.join(folder, path), "rb") as file:
            image_suffix(file.read(32))
    except (OSError, BadSampleError):
        return False
    return True


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _class_of(path: str) -> str:
    return path.partition("/")[0]


class FolderShard(FileShard):
    """Images by path; `classes` is empty where captions lie beside the images.

    Its size is the number of images: a folder has no bytes of its own.

    Args:
      path: the folder.
      images: paths of the images from the folder.
      side_files: paths of the files with captions and records.
      classes: names of the classes in the order of the labels.
      options: of them, `caption` (the key in a `.json`) and `txt`.
    """

    def __init__(
        self,
        path: str,
        images: list[str],
        side_files: set[str],
        classes: list[str],
        options: Options,
    ):
        super().__init__(path, len(images))
        self._caption_key, self._whole_txt = options.caption or "caption", options.whole_txt
        self.classes = classes
        self._images = images
        self._side_files = side_files
        self._label = {name: i for i, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self._images)

    def key(self, i: int) -> str:
        """Return the image's path from the folder."""
        return self._images[i]

    def image(self, i: int, handles: Handles) -> bytes:
        return read_whole(os.path.join(self.path, self._images[i]), MAX_IMAGE_BYTES)

    def captions(self, i: int, handles: Handles) -> list[str]:
        if self.classes:
            return [_class_of(self._images[i]).replace("_", " ")]
        text = self._side_file(i, ".txt")
        if text is not None:
            return text_captions(text, lambda: self._json_caption(i, handles), self._whole_txt)
        if _stem(self._images[i]) + ".json" not in self._side_files:
            raise BadSampleError("no_caption")
        return caption_values(self._json_caption(i, handles))

    def captions_beside(self, suffix: str, i: int, handles: Handles) -> list[str]:
        """Return the captions of the file `<image without its ending>.<suffix>`."""
        text = self._side_file(i, f".{suffix}")
        if text is None:
            raise BadSampleError("no_caption", f"no .{suffix}")
        return text_captions(text, lambda: None, self._whole_txt)

    def _json_caption(self, i: int, handles: Handles) -> Any:
        return self.record(i, handles).get(self._caption_key)

    def label(self, i: int, handles: Handles) -> int:
        return self._label[_class_of(self._images[i])] if self.classes else -1

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        text = self._side_file(i, ".json")
        return {} if text is None else json_record(text)

    def _side_file(self, i: int, suffix: str) -> bytes | None:
        path = _stem(self._images[i]) + suffix
        if path not in self._side_files:
            return None
        return read_whole(os.path.join(self.path, path), MAX_TEXT_BYTES)

    def incomplete(self) -> dict[str, list[str]]:
        """Return the images with neither `.txt` nor `.json`."""
        if self.classes:
            return {}
        return {
            "no_caption": [
                path
                for path in self._images
                if not self._side_files & {_stem(path) + ".txt", _stem(path) + ".json"}
            ]
        }


def open_folder(path: str, options: Options, *, need_captions: bool = True) -> FolderShard:
    """Open a folder of images, which come in the order of their paths.

    Args:
      need_captions: False lets images lie in it without captions.

    Raises:
      UserError: images lie in it with neither captions nor class folders, or the folders in it are
        the splits of a set.
    """
    files = list(_walk(path))
    images = _images(path, files)
    side_files = {file for file in files if file.endswith((".txt", ".json"))}
    if any(_stem(image) + ".txt" in side_files for image in images):
        _note_captions_alone(path, images, side_files)
        return FolderShard(path, images, side_files, [], options)
    loose = [image for image in images if "/" not in image]
    splits = _splits(images)
    if (loose or splits) and not need_captions:
        return FolderShard(path, images, side_files, [], options)
    if loose:
        raise UserError(
            f"folder {path}: {loose[0]} has no caption: put {_stem(loose[0])}.txt beside it, a"
            " metadata.jsonl into the folder, or every image into a folder of its class"
        )
    if splits:
        raise UserError(
            f"folder {path}: {', '.join(splits)} are splits of a set and no classes: name one, "
            f"{os.path.join(path, splits[0])}"
        )
    classes = sorted({_class_of(image) for image in images})
    _note_classes(path, images, classes)
    return FolderShard(path, images, side_files, classes, options)


def _note_classes(path: str, images: Sequence[str], classes: Sequence[str]) -> None:
    """Say where the classes are perhaps not those that the user has in mind."""
    deep = next((image for image in images if image.count("/") > 1), "")
    if deep:
        note(
            f"folder {path}: the outer folder is an image's class, {_class_of(deep)!r} of {deep}; "
            "to name the inner ones, give the outer folder"
        )
    with os.scandir(path) as entries:
        others = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    empty = [name for name in others if name not in classes]
    if empty:
        note(f"folder {path}: {len(empty)} folders hold no image and are no class: {empty[0]}")


def _note_captions_alone(path: str, images: Sequence[str], side_files: set[str]) -> None:
    stems = {_stem(image) for image in images}
    alone = sorted(f for f in side_files if f.endswith(".txt") and _stem(f) not in stems)
    if alone:
        note(f"folder {path}: {len(alone)} .txt files have no image beside them: {alone[0]}")


def _splits(images: Sequence[str]) -> list[str]:
    """Return the names of the folders, if they are splits ("train", "val") and no classes."""
    names = sorted({_class_of(image) for image in images})
    nested = {_class_of(image) for image in images if image.count("/") > 1}
    all_splits = all(_SPLIT.fullmatch(name.lower()) for name in names)
    return names if all_splits or any(_SPLIT.fullmatch(n.lower()) for n in nested) else []
