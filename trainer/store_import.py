"""`store import`: finds the tokenizer and the settings that an importer of `logit_store` needs, and runs
it."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import CodecSpec, TeacherIdentity, TokenizerIdentity
from sparsekd.logit_store.places.paths import store_path
from sparsekd.logit_store.tools.derive import Progress
from sparsekd.trainer.errors import ConfigError
from sparsekd.trainer.importers.document import Source
from sparsekd.trainer.importers.store import ImportResult, ImportSettings, import_source

COMPRESSION_NAME = "compression_config.yaml"


def run(flags: argparse.Namespace, progress: Progress) -> ImportResult:
    """Imports what the flags of `store import` name.

    Raises:
        ConfigError: a flag is missing, or belongs to another format.
        StoreError: the source cannot be imported.
    """
    _check_flags(flags)
    if flags.format == "megatron":
        from sparsekd.logit_store.protocol.reader import open_store
        from sparsekd.trainer.importers.megatron import import_megatron, open_megatron

        tokens = open_store(flags.tokens)
        settings = _settings(flags, tokens.manifest.tokenizer, tokens.tokenizer_path)
        capture = open_megatron(Path(flags.source))
        return import_megatron(capture, tokens, flags.split, store_path(flags.target), settings, progress)
    source = _open(flags)
    # Only now: transformers takes its time.
    from sparsekd.trainer.corpus.tokenizer import load_tokenizer, save_tokenizer, tokenizer_identity

    tokenizer = load_tokenizer(flags.tokenizer, None)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        name = Path(flags.tokenizer).name
        identity = tokenizer_identity(tokenizer, Path(folder), name)
        return import_source(
            source, store_path(flags.target), _settings(flags, identity, Path(folder)), progress
        )


def _check_flags(flags: argparse.Namespace) -> None:
    needed = "tokens" if flags.format == "megatron" else "tokenizer"
    if getattr(flags, needed) is None:
        why = (
            "a token store, because Megatron-LM's tars hold no tokens"
            if flags.format == "megatron"
            else "the folder or hub name of the tokenizer that made the ids"
        )
        raise ConfigError(f"store import --format {flags.format} needs --{needed}: {why}.")
    others = {
        "tokens": flags.format == "megatron",
        "tokenizer": flags.format != "megatron",
        "compression": flags.format == "distillkit",
        "sequence_length": flags.format != "megatron",
    }
    for name, belongs in others.items():
        if getattr(flags, name) is not None and not belongs:
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} does not belong to store import --format {flags.format}; leave it away."
            )


def _open(flags: argparse.Namespace) -> Source:
    path = Path(flags.source)
    if flags.format == "nemo":
        from sparsekd.trainer.importers.nemo import open_nemo

        return open_nemo(path)
    if flags.format == "vllm":
        from sparsekd.trainer.importers.vllm import open_vllm

        return open_vllm(path)
    from sparsekd.trainer.importers.distillkit import open_distillkit, read_compression

    folder = path if path.is_dir() else path.parent
    place = Path(flags.compression) if flags.compression else folder / COMPRESSION_NAME
    return open_distillkit(path, read_compression(_read_yaml(place), str(place)))


def _read_yaml(place: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"{place} is not there, and DistillKit's files cannot be read without their settings: name it "
            "with --compression."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StoreError(f"{place} cannot be read as YAML ({error}).") from error
    if not isinstance(content, dict):
        raise StoreError(f"{place} holds no settings.")
    return content


def _settings(flags: argparse.Namespace, tokenizer: TokenizerIdentity, files: Path) -> ImportSettings:
    return ImportSettings(
        tokenizer=tokenizer,
        tokenizer_files=files,
        teacher=TeacherIdentity(
            name=flags.teacher_name,
            revision=flags.teacher_revision,
            weights_digest="unknown",
            dtype="unknown",
            logits_dtype="unknown",
            engine=f"imported from {flags.format}",
            versions={},
        ),
        codec=CodecSpec(flags.codec, {}),
        sequence_length=flags.sequence_length,
        k=flags.k,
        mask_short=flags.short == "mask",
        rows_per_shard=flags.rows_per_shard,
    )
