"""The error of a shard that cannot be opened, with the cause under which it is counted."""

from typing import Literal, get_args

from clip_jax.errors import UserError

ShardCause = Literal["shard_missing", "shard_unreadable", "shard_damaged", "shard_changed"]
"""No such file; the disk or the server gives no bytes; the bytes are wrong; others than before."""

SHARD_CAUSES = frozenset(get_args(ShardCause))


class ShardError(UserError):
    """A shard that cannot be used as a whole; `cause` is the name under which it is counted."""

    def __init__(self, cause: ShardCause, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.cause, str(self))


def unreadable(error: BaseException, message: str) -> ShardError:
    """Return the error of a shard that the disk, the server or a library does not give."""
    missing = isinstance(error, FileNotFoundError)
    return ShardError("shard_missing" if missing else "shard_unreadable", message)


def damaged(path: str, offset: int, reason: str) -> ShardError:
    """Return the error of a shard that cannot be trusted from a byte on."""
    return ShardError(
        "shard_damaged",
        f"shard {path} is cut or damaged at byte {offset}: {reason}."
        " Fetch it again, or leave it out of the data pattern",
    )
