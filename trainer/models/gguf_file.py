"""Models in llama.cpp's format: one file with configuration, tokens and weights, of few bits mostly.

transformers reads it and makes weights of the asked dtype from it, those that the rounded ones stand for.
"""

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from sparsekd.logit_store.errors import first_line
from sparsekd.trainer.run.errors import ModelError

SUFFIX = ".gguf"
_TOKENS = "tokenizer.ggml.tokens"


def gguf_file_of(path: str, asked: str | None, *, setting: str) -> str | None:
    """Which file of a folder is the model; None where it is one of transformers' own.

    Args:
        path: Folder or hub name.
        asked: The file that the user names, of a folder or of a hub model.
        setting: The key of the path, for messages.

    Raises:
        ModelError: The folder lacks the file, or has several and none is named.
    """
    folder = Path(path)
    key = setting.replace(".path", ".gguf_file")
    if folder.is_file():
        raise ModelError(
            f"{setting}={path} is a file; name its folder, {folder.parent}, and the file as "
            f"{key}={folder.name}."
        )
    if asked is not None:
        if Path(asked).name != asked or (folder.is_dir() and not (folder / asked).is_file()):
            raise ModelError(f"{setting}={path} has no file {key}={asked}; name one that lies in it.")
        return asked
    found = sorted(file.name for file in folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
    if not found or (folder / "config.json").is_file():
        return None
    if len(found) > 1:
        raise ModelError(
            f"{setting}={path} holds {len(found)} files {SUFFIX}, the first {found[0]}; name one as {key}."
        )
    return found[0]


def gguf_place(path: str, file: str, revision: str | None) -> Path:
    """The file itself, of a folder or a hub model."""
    return Path(path, file) if Path(path).is_dir() else Path(str(cached_file(path, file, revision=revision)))


def gguf_tokens(place: Path, named: str) -> dict[int, str]:
    """The tokens in a file by their ids; none where it has none.

    Raises:
        ModelError: It cannot be read.
    """
    try:
        from gguf import GGUFReader

        field: Any = GGUFReader(place).get_field(_TOKENS)
        return {} if field is None else dict(enumerate(field.contents()))
    except Exception as error:  # of a damaged file the reader raises anything
        raise ModelError(f"{named}: {gguf_problem(place.name, error)}") from error


def gguf_problem(file: str, error: Exception) -> str:
    """What is wrong with a file, or with reading any."""
    if isinstance(error, ImportError):
        return f"{file} needs gguf ({first_line(error)}); pip install 'sparsekd[quantised]'."
    return f"{file} cannot be read as GGUF ({first_line(error)}); fetch it again, or name another."
