"""Errors that a user can mend: the command line prints their one sentence, no traceback, and exits with 2."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

# What torch.save says of a failed write: its zip writer raises no OSError.
_WORDS_OF_TORCH = ("PytorchStreamWriter", "file write failed", "inline_container", "unexpected pos")


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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write to `path`, by Python or by torch.save, into one sentence that names it.

    Raises:
        UserError: The disk is full or fails, or the place may not be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif any(word in str(error) for word in _WORDS_OF_TORCH):
            reason = "torch could not write all of a file"
        else:
            raise
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        raise UserError(
            f"{path} cannot be written ({reason}; {shutil.disk_usage(existing).free:,} bytes are free on its "
            "disk); make room or choose another place, then run the same command again: it goes on from the "
            "newest checkpoint."
        ) from error
