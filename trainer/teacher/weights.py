"""Which teacher it is: its weights, and everything else on which its records depend."""

from importlib.util import find_spec
from pathlib import Path

from sparsekd.logit_store.manifest import TeacherIdentity
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.models.causal_lm import load_config
from sparsekd.trainer.models.placement import quantization_of
from sparsekd.trainer.models.source import teacher_source
from sparsekd.trainer.models.weights import files_digest
from sparsekd.trainer.run.versions import MODEL_PACKAGES, versions_of


def teacher_name(path: str) -> str:
    """The name in the manifest: a folder's last part (stores travel), a hub name whole."""
    return Path(path).resolve().name if Path(path).is_dir() else path


def teacher_identity(
    config: TeacherConfig,
    path: str,
    *,
    device_type: str,
    threads: int,
    revision: str | None,
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
    source = teacher_source(config, path)
    quantization = quantization_of(load_config(source, "teacher"), source.placement, source.gguf_file)
    settings = {
        "attention": config.attention,
        "device": device_type,
        **({"threads": threads} if device_type == "cpu" else {}),
        "micro_batch_rows": config.micro_batch_rows,
        **({"sort_rows": config.sort_rows} if config.sort_rows else {}),
        "chunk_positions": config.chunk_positions,
        "impl": config.impl,
        **({"tensor_parallel": config.tensor_parallel} if config.tensor_parallel > 1 else {}),
        **({"quantization": quantization} if quantization is not None else {}),
    }
    packages: tuple[str, ...] = MODEL_PACKAGES
    packages += ("triton",) if config.impl == "triton" else ()
    packages += ("bitsandbytes",) if quantization is not None and find_spec("bitsandbytes") else ()
    return TeacherIdentity(
        name=teacher_name(path),
        revision=revision,
        weights_digest=files_digest(source, key="teacher"),
        dtype=config.dtype,
        logits_dtype="float32",
        engine="transformers " + " ".join(f"{name}={value}" for name, value in settings.items()),
        versions=versions_of(packages),
    )


def engine_settings(engine: str) -> dict[str, str]:
    """The settings in a manifest's `engine`, as `teacher_identity` writes them; those that it names."""
    return dict(word.split("=", 1) for word in engine.split() if "=" in word)
