"""Which teacher it is: a fingerprint of its files, and everything else on which its records depend."""

import hashlib
from importlib import metadata
from pathlib import Path

from transformers.utils import cached_file

from sparsekd.logit_store.manifest import TeacherIdentity
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.run.errors import ModelError

READ_BYTES = 1 << 24

# Packages whose version can change a record's bits.
PACKAGES = ("sparsekd", "torch", "transformers")


def model_folder(path: str, revision: str | None) -> Path:
    """The folder that holds a model's files: `path` itself, or a hub model's snapshot in the local cache.

    Raises:
        ModelError: There is no config.json.
    """
    if Path(path).is_dir():
        config = Path(path, "config.json")
        if not config.is_file():
            raise ModelError(f"teacher.path={path} has no config.json; give the folder of a saved model.")
        return config.parent
    try:
        return Path(str(cached_file(path, "config.json", revision=revision))).parent
    except (OSError, ValueError) as error:
        raise ModelError(f"teacher.path={path} has no config.json that can be read ({error}).") from error


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
        with path.open("rb") as stream:
            while block := stream.read(READ_BYTES):
                total.update(block)
    return total.hexdigest()


def teacher_name(path: str) -> str:
    """The name in the manifest: a folder's last part (stores travel), a hub name whole."""
    return Path(path).resolve().name if Path(path).is_dir() else path


def teacher_identity(
    config: TeacherConfig, path: str, *, device_type: str, threads: int, revision: str | None
) -> TeacherIdentity:
    """What the manifest says of the teacher, its engine and the settings that decide bits.

    Args:
        config: The teacher's settings, resolved.
        path: Its folder or hub name.
        device_type: "cpu" or "cuda".
        threads: CPU threads of a rank: they change the order of sums on the CPU.
        revision: Commit of a hub model where it is known.

    Raises:
        ModelError: The teacher's files cannot be found.
    """
    settings = {
        "attention": config.attention,
        "device": device_type,
        **({"threads": threads} if device_type == "cpu" else {}),
        "micro_batch_rows": config.micro_batch_rows,
        "chunk_positions": config.chunk_positions,
        "impl": config.impl,
    }
    packages = (*PACKAGES, "triton") if config.impl == "triton" else PACKAGES
    return TeacherIdentity(
        name=teacher_name(path),
        revision=revision,
        weights_digest=weights_digest(model_folder(path, config.revision)),
        dtype=config.dtype,
        logits_dtype="float32",
        engine="transformers " + " ".join(f"{name}={value}" for name, value in settings.items()),
        versions={name: metadata.version(name) for name in packages},
    )


def engine_settings(engine: str) -> dict[str, str]:
    """The settings in a manifest's `engine`, as `teacher_identity` writes them; those that it names."""
    return dict(word.split("=", 1) for word in engine.split() if "=" in word)
