"""What a failed request to the hub means for the user, in one line."""

from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from clip_jax.errors import UserError, short
from clip_jax.pretrained.download import BrokenOffError
from clip_jax.pretrained.repositories import HUB_PREFIX

LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def hub_error(error: Exception, shown: str, server: str = "") -> UserError:
    """Return the line that tells a user what a failed request means and what to do.

    Args:
      error: what `huggingface_hub`, its session or `download` raised.
      shown: what was to be fetched, as the user named it.
      server: the address that was asked; empty is the hub's.
    """
    return UserError(f"{shown}: {_meaning(error, shown, server or constants.ENDPOINT)}")


def _meaning(error: Exception, shown: str, server: str) -> str:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        page = f"{server}/{shown.removeprefix(HUB_PREFIX).partition('@')[0]}"
        return f"it is given to those who accept its conditions: do so at {page}, then {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision; name a branch, a tag or a commit"
    if isinstance(error, RepositoryNotFoundError):
        return f"{server} knows no such repository, or it is private: correct the name, or {LOGIN}"
    if isinstance(error, HfHubHTTPError):
        return _status_meaning(error.response.status_code, str(error.response.url), server)
    if isinstance(error, FileMetadataError):
        return f"{server} does not answer as a hub does; check HF_ENDPOINT and the proxies"
    if isinstance(error, BrokenOffError):
        return f"it could not be fetched whole ({error}): the next call goes on with what has come"
    return f"{server} does not answer ({short(error)}); check the network and HF_ENDPOINT"


def _status_meaning(code: int, url: str, server: str) -> str:
    if code == 401:
        return f"{server} refuses the token: {LOGIN} anew"
    if code == 403:
        return f"{server} does not allow it: {LOGIN} as somebody who may read it"
    if code == 404:
        return f"{url} does not exist; correct the name"
    if code == 429:
        return f"{server} has had too many requests from here: wait a while, or {LOGIN}"
    return f"{server} answers {code}; try again later"
