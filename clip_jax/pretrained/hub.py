"""Repositories of the Hugging Face hub: what they hold, and their files in the hub's own cache.

Through `huggingface_hub`: its cache (`HF_HOME`), its token (`HF_TOKEN` or `hf auth login`),
`HF_ENDPOINT` and `HF_HUB_OFFLINE` mean here what they mean there. Its downloads begin anew after a
kill and do not look at digests; ours go on and do, and lie where it looks for them.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
from filelock import Timeout
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from clip_jax.errors import UserError, short
from clip_jax.files import atomic_write
from clip_jax.pretrained.download import (
    PAUSE,
    RETRIED,
    BrokenOffError,
    RemoteFile,
    download,
    room_needed,
)
from clip_jax.pretrained.hub_errors import hub_error
from clip_jax.pretrained.repositories import HUB_PREFIX

LISTING_TRIES = 3
LARGEST_IN_GIT = 11_000_000
"""Bytes above which the hub keeps a file outside git."""

T = TypeVar("T")


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Attributes:
      name: "owner/name".
      revision: the branch, tag or commit that was asked for.
      commit: the commit's digits.
      files: what it holds; of one that is known from the cache alone, what lies there.
      model_type: of its `config.json`, where the hub says it.
      online: whether the hub was asked.
    """

    name: str
    revision: str
    commit: str
    files: Mapping[str, RemoteFile | None]
    model_type: str | None
    online: bool

    @property
    def shown(self) -> str:
        """The name as a user gives it."""
        return shown_name(self.name, self.revision)

    @property
    def folder(self) -> Path:
        """The folder in the cache that holds the files of this commit."""
        return _storage(self.name) / "snapshots" / self.commit


def shown_name(name: str, revision: str) -> str:
    """Return a repository's name as a user gives it."""
    at = "" if revision == constants.DEFAULT_REVISION else f"@{revision}"
    return f"{HUB_PREFIX}{name}{at}"


def _storage(name: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


def open_repository(name: str, revision: str = "") -> Repository:
    """Return what a repository holds; what its cache holds where the hub cannot be asked.

    Raises:
      UserError: there is no such repository, it may not be read, or neither the hub nor the cache
        has it.
    """
    revision = revision or constants.DEFAULT_REVISION
    cached = _cached_repository(name, revision)
    if constants.HF_HUB_OFFLINE:
        if cached is None:
            raise UserError(
                f"{shown_name(name, revision)} is not in {constants.HF_HUB_CACHE}, and "
                "HF_HUB_OFFLINE forbids to fetch it: unset that, or fetch it elsewhere and copy "
                "the folder"
            )
        return cached
    tries = 1 if cached else LISTING_TRIES
    try:
        return _patiently(lambda: _listed_repository(name, revision), tries)
    except (HfHubHTTPError, httpx2.RequestError, BrokenOffError) as error:
        failure = hub_error(error, shown_name(name, revision))
        if cached is None or not _is_away(error):
            raise failure from None
        print(f"{failure}; taking what is in the cache", file=sys.stderr, flush=True)
        return cached


def _patiently(call: Callable[[], T], tries: int) -> T:
    """Return what a request returns, tried again where the server may answer otherwise."""
    for attempt in range(tries):
        try:
            return call()
        except (HfHubHTTPError, httpx2.RequestError) as error:
            if attempt == tries - 1 or not _is_away(error):
                raise
        time.sleep(PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _is_away(error: Exception) -> bool:
    """Return whether the hub could not be asked, rather than refused."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRIED
    return True


def _listed_repository(name: str, revision: str) -> Repository:
    try:
        info = HfApi(endpoint=constants.ENDPOINT, library_name="clip_jax").model_info(
            name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except HFValidationError as error:
        raise UserError(f"{HUB_PREFIX}{name} is no repository's name ({short(error)})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenOffError(f"what it answers is no listing: {short(error)}") from None
    # They become parts of paths here.
    commit = str(info.sha)
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or info.siblings is None:
        raise BrokenOffError("what it answers is no listing")
    files = {}
    for file in info.siblings:
        url = hf_hub_url(name, file.rfilename, revision=commit, endpoint=constants.ENDPOINT)
        size = file.size if isinstance(file.size, int) and file.size >= 0 else None
        files[file.rfilename] = RemoteFile(url, size, _published_digest(file))
    model_type = (info.config or {}).get("model_type")
    return Repository(name, revision, commit, files, model_type, online=True)


def _published_digest(file: RepoSibling) -> str:
    """Return the SHA-256 of a large file, git's digest of a small one; empty for what is neither.

    Of a large file git's digest would be that of a pointer.
    """
    if file.lfs is not None:
        digest, length = str(file.lfs.sha256), 64
    else:
        digest, length = str(file.blob_id), 40
        if not isinstance(file.size, int) or file.size > LARGEST_IN_GIT:
            return ""
    return digest if re.fullmatch(rf"[0-9a-f]{{{length}}}", digest) else ""


def _cached_repository(name: str, revision: str) -> Repository | None:
    """Return what the cache holds of a repository; None if that is nothing."""
    reference = _storage(name) / "refs" / revision
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision
    folder = _storage(name) / "snapshots" / commit
    names = [path.name for path in folder.iterdir() if path.exists()] if folder.is_dir() else []
    if not names:
        return None
    return Repository(name, revision, commit, dict.fromkeys(names), None, online=False)


def fetch_files(repository: Repository, names: Sequence[str]) -> Path:
    """Return the folder of the cache that holds these files, fetched if they are not there.

    Raises:
      UserError: they cannot be fetched or written, or are not what was published.
    """
    folder = repository.folder
    missing = [name for name in names if not (folder / name).exists()]
    if missing and not repository.online:
        raise UserError(
            f"{repository.shown}: {missing[0]} is not in the cache, and the hub cannot be asked"
        )
    blobs = _storage(repository.name) / "blobs"
    to_come = {name: repository.files[name] for name in missing}
    _announce(
        repository.shown,
        blobs.parent,
        {
            name: (remote, blobs / remote.digest)
            for name, remote in to_come.items()
            if remote is not None and not (blobs / remote.digest).is_file()
        },
    )
    try:
        for name, remote in to_come.items():
            assert remote is not None  # an online listing has every file's address
            _fetch_file(repository, name, remote, blobs)
        if repository.online and repository.revision != repository.commit:
            _remember(repository)
    except OSError as error:
        if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled):
            raise hub_error(error, repository.shown) from None
        raise UserError(
            f"{constants.HF_HUB_CACHE} cannot be written ({error.strerror or error}): let HF_HOME "
            "name another folder"
        ) from None
    except (httpx2.RequestError, BrokenOffError) as error:
        raise hub_error(error, repository.shown) from None
    return folder


def _announce(shown: str, where: Path, to_come: Mapping[str, tuple[RemoteFile, Path]]) -> None:
    """Say in one line what is fetched, how large it is and to where."""
    if not to_come:
        return
    size = sum(remote.size or 0 for remote, _ in to_come.values())
    left = sum(room_needed(target, remote) for remote, target in to_come.values())
    names = sorted(to_come, key=lambda name: -(to_come[name][0].size or 0))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    there = f" ({bytes_text(size - left)} of it are there)" if left < size else ""
    print(
        f"fetching {shown}: {names[0]}{more}, {bytes_text(size)}{there}, to {where}",
        file=sys.stderr,
        flush=True,
    )


def bytes_text(count: int) -> str:
    """Return a number of bytes as one reads it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _fetch_file(repository: Repository, name: str, remote: RemoteFile, blobs: Path) -> None:
    """Bring one file into the cache: its bytes under its digest, and its name beside them."""
    if remote.digest and remote.size is not None:
        blob = blobs / remote.digest
        lock = Path(constants.HF_HUB_CACHE) / ".locks" / blobs.parent.name / f"{remote.digest}.lock"
        for folder in (blobs, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(lock, repository.shown):
            if not blob.is_file():
                download(
                    remote, blob, title=name, headers=build_hf_headers(library_name="clip_jax")
                )
    # It finds the bytes there and gives them their name; it fetches what has no digest.
    hf_hub_download(
        repository.name,
        name,
        revision=repository.commit,
        cache_dir=constants.HF_HUB_CACHE,
        endpoint=constants.ENDPOINT,
        library_name="clip_jax",
    )


@contextmanager
def _locked(lock: Path, shown: str) -> Iterator[None]:
    """Hold a lock, the hub's own for its files: whoever comes second finds the file."""
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=1.0))
        except Timeout:
            print(f"{shown}: another process fetches it; waiting", file=sys.stderr, flush=True)
            stack.enter_context(WeakFileLock(lock))
        yield


def _remember(repository: Repository) -> None:
    """Note the commit of a branch, for when the hub cannot be asked."""
    reference = _storage(repository.name) / "refs" / repository.revision
    try:
        if reference.read_text(encoding="utf-8") == repository.commit:
            return
    except OSError:
        pass
    with atomic_write(reference, shared=True) as partial:
        partial.write_text(repository.commit, encoding="utf-8")


def fetch_address(remote: RemoteFile, target: Path, shown: str) -> Path:
    """Return a file that lies at an address of its own, fetched if it is not there.

    Raises:
      UserError: it cannot be fetched or written, or is not what was published.
    """
    if target.is_file():
        return target
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{shown} is not at {target}, and HF_HUB_OFFLINE forbids to fetch it: unset that, or "
            "copy the file there"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock"), shown):
            if not target.is_file():
                remote = _with_size(remote)
                _announce(shown, target.parent, {target.name: (remote, target)})
                download(remote, target, title=target.name)
    except (HfHubHTTPError, httpx2.RequestError, BrokenOffError) as error:
        raise hub_error(error, shown, server=remote.url) from None
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be written ({error.strerror or error}): let HF_HOME name "
            "another folder"
        ) from None
    return target


def _with_size(remote: RemoteFile) -> RemoteFile:
    def ask() -> httpx2.Response:
        response = get_session().head(
            remote.url,
            headers={"Accept-Encoding": "identity"},
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        hf_raise_for_status(response)
        return response

    length = _patiently(ask, LISTING_TRIES).headers.get("Content-Length", "")
    return RemoteFile(remote.url, int(length) if length.isdigit() else None, remote.digest)
