"""A folder of images: with a caption file beside each, or one folder a class.

`a/b.jpg` with `a/b.txt` beside it is a pair (img2dataset's "files" layout). Where no image has
such a file, the folder it lies in is its class: the name is the caption, and the label its place
among the names in order.
"""

import os
from collections.abc import Iterator
from typing import Any

from clip_jax.data.formats.file_shard import FileShard
from clip_jax.data.formats.options import Options
from clip_jax.data.formats.remote import read_whole
from clip_jax.data.images import IMAGE_SUFFIXES
from clip_jax.data.shards import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSampleError,
    Handles,
    caption_lines,
    json_record,
)
from clip_jax.errors import UserError


def holds_images(folder: str) -> bool:
    """Return whether an image lies in the folder, at any depth."""
    return any(_is_image(path) for path in _walk(folder))


def _walk(folder: str) -> Iterator[str]:
    """Yield the files below a folder, as paths from it, in name order; hidden ones are left out."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(path, name), folder)


def _is_image(path: str) -> bool:
    return path.rpartition(".")[2].lower() in IMAGE_SUFFIXES


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
    """

    def __init__(self, path: str, images: list[str], side_files: set[str], classes: list[str]):
        super().__init__(path, len(images))
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
        if text is None:
            raise BadSampleError("no_caption")
        return caption_lines(text)

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
        """Return the images without a caption file."""
        if self.classes:
            return {}
        return {
            "no_caption": [p for p in self._images if _stem(p) + ".txt" not in self._side_files]
        }


def open_folder(path: str, options: Options, *, need_captions: bool = True) -> FolderShard:
    """Open a folder of images, which come in the order of their paths.

    Args:
      need_captions: False lets images lie in it without captions.

    Raises:
      UserError: images lie in it with neither captions nor class folders.
    """
    files = list(_walk(path))
    images = [file for file in files if _is_image(file)]
    side_files = {file for file in files if file.endswith((".txt", ".json"))}
    if any(_stem(image) + ".txt" in side_files for image in images):
        return FolderShard(path, images, side_files, [])
    loose = [image for image in images if "/" not in image]
    if loose and not need_captions:
        return FolderShard(path, images, side_files, [])
    if loose:
        raise UserError(
            f"folder {path}: {loose[0]} has no caption: put {_stem(loose[0])}.txt beside it, a"
            " metadata.jsonl into the folder, or every image into a folder of its class"
        )
    classes = sorted({_class_of(image) for image in images})
    return FolderShard(path, images, side_files, classes)
