"""Put a folder on the hub as a repository of its own."""

from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from clip_jax.errors import UserError, short
from clip_jax.pretrained.hub_errors import LOGIN, hub_error
from clip_jax.pretrained.repositories import HUB_PREFIX

CARD = "README.md"
NO_MODEL = {CARD, ".gitattributes"}
"""Files that the hub or its user may have put into a new repository."""


def check_free(name: str) -> None:
    """Raise UserError if nobody is logged in, or the repository "owner/name" holds a model."""
    try:
        _hub().whoami()
        files = set(_hub().list_repo_files(name)) - NO_MODEL
    except RepositoryNotFoundError:
        return  # it will be made
    except (LocalTokenNotFoundError, HFValidationError, HfHubHTTPError, httpx2.RequestError) as e:
        raise _upload_error(e, name) from None
    if files:
        raise UserError(
            f"{HUB_PREFIX}{name} holds something already ({min(files)}); name another repository, "
            "or convert to a folder and send that with `hf upload`"
        )


def upload(folder: Path, name: str, *, private: bool | None) -> str:
    """Upload a folder as one commit; return the repository's address.

    A card that the repository has is left as it is.

    Args:
      folder: what to upload.
      name: the repository, "owner/name"; made if it does not exist.
      private: of a new repository: whether its owner alone sees it; None is the owner's default.

    Raises:
      UserError: the hub does not allow or take it.
    """
    try:
        url = _hub().create_repo(name, private=private, exist_ok=True)
        has_card = CARD in _hub().list_repo_files(name)
        _hub().upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload a model",
            ignore_patterns=[CARD] if has_card else None,
        )
        return str(url)
    except (HFValidationError, HfHubHTTPError, httpx2.RequestError) as error:
        raise _upload_error(error, name) from None
    except (RuntimeError, ValueError) as error:  # of one of the files, with its reason behind it
        raise _upload_error(error.__cause__ or error, name) from None


def _hub() -> HfApi:
    return HfApi(endpoint=constants.ENDPOINT, library_name="clip_jax")


def _upload_error(error: BaseException, name: str) -> UserError:
    shown = f"{HUB_PREFIX}{name}"
    if isinstance(error, LocalTokenNotFoundError):
        return UserError(f"{shown}: nobody is logged in: {LOGIN}")
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 403:
        return UserError(f"{shown}: your token may not write there: {LOGIN} with one that may")
    if isinstance(error, HfHubHTTPError | httpx2.RequestError):
        return hub_error(error, shown)
    return UserError(f"{shown} was not uploaded ({short(error)}); correct the name, or try again")
