"""A folder of images: with a caption file beside each, or one folder a class.

`a/b.jpg` with `a/b.txt` beside it is a pair (img2dataset's "files" layout). Where no image has
such a file, the folder it lies in is its class: the name is the caption, and the label its place
among the names in order.
"""

import os
from collections.abc import Iterator
from typing import Any

from clip_jax.data.formats.options import Options
from clip_jax.data.formats.remote import read_whole
from clip_jax.data.formats.webdataset import IMAGE_SUFFIXES
from clip_jax.data.shards import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSampleError,
    Handles,
    caption_lines,
    json_record,
)
from clip_jax.errors import UserError


def _walk(folder: str) -> Iterator[str]:
    """Paths of the files below a folder, from it, in name order; hidden ones are left out."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(path, name), folder)


def _is_picture(path: str) -> bool:
    return path.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def holds_pictures(folder: str) -> bool:
    """Whether there is one, at any depth."""
    return any(_is_picture(path) for path in _walk(folder))


class FolderShard:
    """Images by path; `classes` is empty where captions lie beside the images."""

    def __init__(self, path: str, pictures: list[str], sides: set[str], classes: list[str]):
        self.path = path
        self.size = len(pictures)  # a folder has no size of its own
        self.classes = classes
        self._pictures = pictures
        self._sides = sides
        self._label = {name: i for i, name in enumerate(classes)}

    @property
    def name(self) -> str:
        return os.path.basename(os.path.normpath(self.path))

    def __len__(self) -> int:
        return len(self._pictures)

    def key(self, i: int) -> str:
        """The image's path from the folder."""
        return self._pictures[i]

    def image(self, i: int, handles: Handles) -> bytes:
        return read_whole(os.path.join(self.path, self._pictures[i]), MAX_IMAGE_BYTES)

    def captions(self, i: int, handles: Handles) -> list[str]:
        if self.classes:
            return [_class_of(self._pictures[i]).replace("_", " ")]
        side = _stem(self._pictures[i]) + ".txt"
        if side not in self._sides:
            raise BadSampleError("no_caption")
        return caption_lines(read_whole(os.path.join(self.path, side), MAX_TEXT_BYTES))

    def label(self, i: int, handles: Handles) -> int:
        return self._label[_class_of(self._pictures[i])] if self.classes else -1

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        side = _stem(self._pictures[i]) + ".json"
        if side not in self._sides:
            return {}
        return json_record(read_whole(os.path.join(self.path, side), MAX_TEXT_BYTES))

    def incomplete(self) -> dict[str, list[str]]:
        if self.classes:
            return {}
        lacking = [p for p in self._pictures if _stem(p) + ".txt" not in self._sides]
        return {"no_caption": lacking}


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _class_of(path: str) -> str:
    return path.partition("/")[0]


def open_folder(path: str, options: Options, *, need_captions: bool = True) -> FolderShard:
    """The images of a folder, in the order of their paths.

    Without `need_captions` images may lie in it alone.

    Raises:
      UserError: images lie in it with neither captions nor class folders.
    """
    files = list(_walk(path))
    pictures = [file for file in files if _is_picture(file)]
    sides = {file for file in files if file.endswith((".txt", ".json"))}
    if any(_stem(picture) + ".txt" in sides for picture in pictures):
        return FolderShard(path, pictures, sides, [])
    loose = [picture for picture in pictures if "/" not in picture]
    if loose and not need_captions:
        return FolderShard(path, pictures, sides, [])
    if loose:
        raise UserError(
            f"folder {path}: {loose[0]} has no caption: put {_stem(loose[0])}.txt beside it, a"
            " metadata.jsonl into the folder, or every image into a folder of its class"
        )
    classes = sorted({_class_of(picture) for picture in pictures})
    return FolderShard(path, pictures, sides, classes)
