"""Which model it is: a fingerprint of its files, whatever their folder is called."""

import hashlib
from pathlib import Path

from transformers.utils import cached_file

from sparsekd.trainer.models.causal_lm import ModelSource, load_config
from sparsekd.trainer.models.gguf_file import gguf_place
from sparsekd.trainer.run.errors import ModelError

READ_BYTES = 1 << 24


def model_folder(path: str, revision: str | None, *, key: str) -> Path:
    """The folder that holds a model's files: `path` itself, or a hub model's snapshot in the local cache.

    Args:
        path: Folder or hub name.
        revision: Of a hub model.
        key: The configuration group that names it ("teacher" or "student"), for messages.

    Raises:
        ModelError: There is no config.json.
    """
    if Path(path).is_dir():
        config = Path(path, "config.json")
        if not config.is_file():
            raise ModelError(f"{key}.path={path} has no config.json; give the folder of a saved model.")
        return config.parent
    try:
        return Path(str(cached_file(path, "config.json", revision=revision))).parent
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}.path={path} has no config.json that can be read ({error}).") from error


def weights_digest(folder: Path) -> str:
    """SHA-256 (hex) over the names and bytes of config.json, the weights, and code that comes with the model.

    Reads every byte of the weights once: about a second per gigabyte.

    Raises:
        ModelError: The folder holds no weights.
    """
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise ModelError(f"{folder} holds no *.safetensors and no *.bin; give the folder of a saved model.")
    files = sorted([*weights, *folder.glob("*.py"), folder / "config.json"], key=lambda path: path.name)
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode("utf-8") + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        _take_in(total, path)
    return total.hexdigest()


def files_digest(source: ModelSource, *, key: str) -> str:
    """SHA-256 (hex) of a source's `weights_digest`, or of its GGUF file.

    Raises:
        ModelError: The source has no model.
    """
    assert source.path is not None
    if source.gguf_file is None:
        return weights_digest(model_folder(source.path, source.revision, key=key))
    total = hashlib.sha256()
    _take_in(total, gguf_place(source.path, source.gguf_file, source.revision))
    return total.hexdigest()


def _take_in(total: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            total.update(block)


def content_of(source: ModelSource, key: str) -> str | None:
    """What a source holds: a folder's `weights_digest`, a hub model's commit; None for a configuration.

    Raises:
        ModelError: The source has no model.
    """
    if source.path is None:
        return None
    config = load_config(source, key)  # it says what is wrong with a path
    commit: str | None = getattr(config, "_commit_hash", None)
    if commit is not None and not Path(source.path).is_dir():
        return commit  # its weights are perhaps not here yet
    return files_digest(source, key=key)
