"""Errors that a user can mend: the command line prints their one sentence, no traceback, and exits with 2."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Something the user can put right: what was found, what was expected, where, and what to do."""


class ConfigError(UserError):
    """A configuration key, value or combination that cannot be used."""


class TypedError(ConfigError):
    """Something wrong in what was typed: equally wrong on every rank."""


class FolderError(ConfigError):
    """A folder that a key names is not there, or not what it should be, as seen from this machine."""


class DataError(UserError):
    """Text, token sequences or a logit store that cannot be used as they are."""


class ModelError(UserError):
    """A teacher or student that cannot be loaded or does not fit its store."""


class OwnerError(UserError):
    """A run folder in which another job trains."""


class Stopped(Exception):
    """A command that was asked to stop has saved what it had, and leaves: the same command goes on."""


class CheckpointError(UserError):
    """A checkpoint or run folder from which the run cannot go on."""


@contextlib.contextmanager
def typed() -> Iterator[None]:
    """Marks errors of what was typed, so that one rank says them for all."""
    try:
        yield
    except FolderError:
        raise
    except ConfigError as error:
        raise TypedError(str(error)) from error


class RankLostError(UserError):
    """Another rank of the job died or hangs."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write to `path` into one sentence that names it.

    Raises:
        UserError: The disk is full or fails, the place may not be written, or its folder is gone.
    """
    try:
        yield
    except FileNotFoundError as error:
        above = (*reversed(path.parents), path)
        missing = next((place for place in above if not os.path.exists(place)), path)
        raise UserError(
            f"{missing} is not there: it was removed while this command ran, or this machine does not see "
            "it; run the same command again: it goes on from the newest checkpoint that is left."
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}; {_room(path)}); make room or choose "
            "another place, then run the same command again: it goes on from the newest checkpoint."
        ) from error


def _room(path: Path) -> str:
    try:
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        return f"{shutil.disk_usage(existing).free:,} bytes are free on its disk"
    except OSError:
        return "its disk does not say how much is free"
