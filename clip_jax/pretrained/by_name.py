"""Published models by their names: what a name stands for, and its files on this machine.

"ViT-B-32:laion2b_s34b_b79k" is open_clip's model and tag, "hf-hub:owner/name" (and "@revision") a
repository of the hub, and "ViT-B/32" OpenAI's archive. A file or folder of that name goes first.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.errors import UserError
from clip_jax.pretrained.hf_config import HF_DEFAULTS
from clip_jax.pretrained.load import (
    HF_CONFIG,
    HF_WEIGHTS,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    Checkpoint,
    read_checkpoint,
    read_json,
    tokenizer_family,
)
from clip_jax.pretrained.repositories import (
    HUB_PREFIX,
    OPENAI_SHA256,
    TOKENIZER_REPOSITORIES,
    openai_address,
    repositories,
)
from clip_jax.pretrained.tags import find_pretrained
from clip_jax.pretrained.work_folder import (
    WEIGHTS_FILENAME,
    is_work_folder,
    read_description,
    read_weights,
)
from clip_jax.tokenizers.folder import SENTENCEPIECE_FILES, tokenizer_from_folder

if TYPE_CHECKING:
    from clip_jax.pretrained.hub import Repository

SAFE = ".safetensors"
_QUICK = "-quickgelu"
_HUB_NAME = re.compile(r"hf-hub:([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")


@dataclasses.dataclass(frozen=True)
class PublishedName:
    """A published model as a user names it.

    Attributes:
      text: the name.
      label: the name as a part of file names and results: of a repository its last part.
      pretrained: open_clip's tag, the repository, or "openai".
      repository, revision: on the hub; empty where the weights have an address of their own.
      file: the one file of weights, where the table names it.
      address: of the weights, where they are on no hub.
      pair: open_clip's "model:tag"; empty where the files say what they are.
    """

    text: str
    label: str
    pretrained: str
    repository: str = ""
    revision: str = ""
    file: str = ""
    address: str = ""
    pair: str = ""


def parse_name(text: str | Path) -> PublishedName | None:
    """Return the published model that a name stands for; None if it is a path.

    Raises:
      UserError: it is nearly the name of one, and of none.
    """
    text = str(text)
    if Path(text).exists():
        return None
    if text.startswith(HUB_PREFIX):
        match = _HUB_NAME.fullmatch(text)
        if match is None or ".." in text:
            raise UserError(f"{text!r} is no repository: write hf-hub:owner/name, or @revision too")
        name, revision = match[1], match[2] or ""
        return PublishedName(text, name.split("/")[-1], name, name, revision)
    if text in OPENAI_SHA256:
        label = text.replace("/", "-")
        return PublishedName(text, label, "openai", address=openai_address(text))
    model, colon, tag = text.partition(":")
    plain = model.removesuffix(_QUICK)
    if plain not in repositories() or "/" in text:
        return None
    return _parse_pair(text, plain, tag if colon else None)


def _parse_pair(text: str, plain: str, tag: str | None) -> PublishedName:
    places = repositories()[plain]
    # open_clip takes tags in any case, and "-" for "_".
    tag = None if tag is None else tag.lower().replace("-", "_")
    model = text.partition(":")[0]
    if tag is None or tag not in places:
        said = "names no tag" if tag is None else f"has no tag {tag!r}"
        near = difflib.get_close_matches(tag or "", places, 3, 0.4) or list(places)[:3]
        tags = ", ".join(f"{model}:{t}" for t in near)
        others = " and others, see clip_jax.list_pretrained()" if len(places) > len(near) else ""
        raise UserError(f"{model} {said}; there is {tags}{others}")
    if find_pretrained(model, tag) is None:
        raise UserError(
            f"{model}:{tag} cannot be loaded: its family is not supported, or {model} has not "
            "this tag; see clip_jax.list_pretrained()"
        )
    pair, place = f"{model}:{tag}", places[tag]
    if place.startswith("https:"):
        return PublishedName(text, model, tag, address=place, pair=pair)
    owner, name, *file = place.split("/")
    return PublishedName(text, model, tag, f"{owner}/{name}", file="".join(file), pair=pair)


def read_model(path: str | Path, model: str | None = None) -> Checkpoint:
    """Read a model by its name, or of a file or folder; a run's own checkpoints are not read.

    Args:
      path: a published model's name, whose files are fetched if they are not there; or what
        `read_checkpoint` takes; or a work folder.
      model: for a file that does not say it, as `read_checkpoint` takes it.

    Returns:
      The model; its `arrays` are empty where the checkpoints of a run hold them.

    Raises:
      UserError: the files cannot be fetched or read, or are no model.
    """
    name = parse_name(path)
    if name is not None:
        return _read_published(name)
    if not is_work_folder(path):
        return read_checkpoint(path, model)
    run = read_description(path)
    weights = Path(path) / WEIGHTS_FILENAME
    arrays = read_weights(weights, run.model) if weights.is_file() else {}
    return Checkpoint(run.model_name, run.model, arrays, run.preprocess, run.tokenizer)


def _read_published(name: PublishedName) -> Checkpoint:
    if name.pair:
        return _with_tokenizer(read_checkpoint(_fetch_pair(name), name.pair), name)
    if name.address:
        return dataclasses.replace(read_checkpoint(_fetch_archive(name)), name=name.text)
    from clip_jax.pretrained.hub import open_repository

    path = _fetch_repository(open_repository(name.repository, name.revision))
    if is_work_folder(path.parent):
        return read_model(path.parent)
    checkpoint = read_checkpoint(path)
    if checkpoint.tokenizer is None and path.name in OPEN_CLIP_WEIGHTS:
        text = dict(read_json(path.parent / OPEN_CLIP_CONFIG)["model_cfg"]["text_cfg"])
        if text.get("hf_tokenizer_name"):
            checkpoint = _fetch_tokenizer(checkpoint, str(text["hf_tokenizer_name"]))
    return dataclasses.replace(checkpoint, name=name.label)


def _fetch_archive(name: PublishedName) -> Path:
    """Return the file of an address that has the file's SHA-256, or its first digits, in it."""
    from huggingface_hub import constants

    from clip_jax.pretrained.download import RemoteFile, has_digest
    from clip_jax.pretrained.hub import fetch_address

    *_, parent, file = name.address.split("/")
    digest = parent if len(parent) == 64 else Path(file).stem.split("-")[-1]
    # Where OpenAI's and open_clip's own code keeps it.
    for folder in (Path(constants.HF_HOME) / "clip", Path("~/.cache/clip").expanduser()):
        if (folder / file).is_file() and has_digest(folder / file, digest):
            return folder / file
    target = Path(constants.HF_HOME) / "clip" / file
    return fetch_address(RemoteFile(name.address, None, digest), target, name.text)


def _fetch_pair(name: PublishedName) -> Path:
    """Return the weights of one of open_clip's pairs: safetensors where the repository has them."""
    if name.address:
        return _fetch_archive(name)
    from clip_jax.pretrained.hub import fetch_files, open_repository

    repository = open_repository(name.repository)
    wanted: Iterable[str] = OPEN_CLIP_WEIGHTS
    if name.file:
        wanted = (str(Path(name.file).with_suffix(SAFE)), name.file)
    weights = next((file for file in wanted if file in repository.files), None)
    if weights is None:
        raise UserError(f"{repository.shown} has no weights: none of {', '.join(wanted)} is there")
    return fetch_files(repository, [weights]) / weights


def _with_tokenizer(checkpoint: Checkpoint, name: PublishedName) -> Checkpoint:
    """Return a pair's checkpoint with its tokenizer, which is CLIP's own or in a repository."""
    if checkpoint.tokenizer is not None:
        return checkpoint
    plain = name.pair.partition(":")[0].removesuffix(_QUICK)
    return _fetch_tokenizer(checkpoint, TOKENIZER_REPOSITORIES.get(plain, name.repository))


def _fetch_tokenizer(checkpoint: Checkpoint, repository_name: str) -> Checkpoint:
    from clip_jax.pretrained.hub import fetch_files, open_repository

    repository = open_repository(repository_name)
    files = choose_tokenizer(repository.files)
    if not files:
        return checkpoint
    folder = fetch_files(repository, files)
    tokenizer = tokenizer_from_folder(folder, tokenizer_family(checkpoint.config))
    return dataclasses.replace(checkpoint, tokenizer=tokenizer)


def _fetch_repository(repository: "Repository") -> Path:
    """Return the weights of a repository, beside which lie its config and its tokenizer."""
    from clip_jax.pretrained.hub import fetch_files

    config, weights = choose_weights(repository)
    files = [config, weights, *choose_shards(repository.files, weights)]
    files += choose_tokenizer(repository.files)
    processors = ("processor_config.json", "preprocessor_config.json")
    if config == HF_CONFIG:
        files += [name for name in processors if name in repository.files]
    return fetch_files(repository, files) / weights


def choose_weights(repository: "Repository") -> tuple[str, str]:
    """Return the config and the weights of a repository to read: no pickle beside safetensors.

    Raises:
      UserError: it holds no model that can be read here.
    """
    files = repository.files
    choices = [(OPEN_CLIP_CONFIG, weights) for weights in OPEN_CLIP_WEIGHTS]
    if repository.model_type is None or repository.model_type in HF_DEFAULTS:
        choices += [(HF_CONFIG, weights) for weights in HF_WEIGHTS]
    there = [choice for choice in choices if files.keys() >= set(choice)]
    if not there:
        raise UserError(
            f"{repository.shown} holds no model that can be read here: neither {OPEN_CLIP_CONFIG} "
            f"nor a {HF_CONFIG} of CLIP with its weights"
        )
    return min(there, key=lambda choice: SAFE not in choice[1])


def choose_shards(files: Collection[str], index: str) -> list[str]:
    """Return the files among which an index divides the weights; none for plain weights."""
    match = re.fullmatch(r"(\w+)\.(\w+)\.index\.json", index)
    if match is None:
        return []
    shard = re.compile(rf"{match[1]}-\d+-of-\d+\.{match[2]}")
    return sorted(file for file in files if shard.fullmatch(file))


def choose_tokenizer(files: Collection[str]) -> list[str]:
    """Return the files of a repository that `tokenizer_from_folder` reads."""
    chosen = [file for file in ("tokenizer.json", *SENTENCEPIECE_FILES) if file in files][:1]
    if not chosen and {"vocab.json", "merges.txt"} <= set(files):
        chosen = ["vocab.json", "merges.txt"]
    if chosen and "tokenizer_config.json" in files:
        chosen.append("tokenizer_config.json")
    return chosen
