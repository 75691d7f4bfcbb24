"""`store import`: finds the format, the tokenizer and the settings that an import needs, and runs it."""

import argparse
import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekd.logit_store.manifest import CodecSpec, TeacherIdentity, TokenizerIdentity
from sparsekd.logit_store.places.paths import store_path
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.tools.derive import Progress
from sparsekd.trainer.importers.document import Format, Options, one_line
from sparsekd.trainer.importers.formats import FORMATS, recognise
from sparsekd.trainer.importers.store import ImportResult, ImportSettings, import_source
from sparsekd.trainer.run.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(flags: argparse.Namespace, progress: Progress) -> ImportResult:
    """Imports what the flags of `store import` name.

    Raises:
        ConfigError: a flag is missing, or belongs to another format.
        StoreError: the source cannot be imported; nothing was written then.
    """
    layout = FORMATS[flags.format] if flags.format else recognise(Path(flags.source))
    _check_flags(flags, layout)

    @functools.cache
    def tokenizer() -> "PreTrainedTokenizerBase":
        # Only now: transformers takes its time.
        from sparsekd.trainer.corpus.tokenizer import load_tokenizer

        try:
            return load_tokenizer(flags.tokenizer, None)
        except DataError as error:  # which speaks of the corpus
            raise ConfigError(
                f"--tokenizer {flags.tokenizer} cannot be used ({one_line(error.__cause__ or error)}): give "
                "the folder or hub name of the tokenizer that made the ids."
            ) from error

    tokens = open_store(flags.tokens) if flags.tokens else None
    options = Options(
        tokenizer=tokenizer,
        tokens=tokens,
        split=flags.split or "train",
        compression=Path(flags.compression) if flags.compression else None,
        alignment=flags.alignment,
    )
    source = layout.read(Path(flags.source), options)
    if tokens is not None:
        settings = _settings(flags, layout, tokens.manifest.tokenizer, tokens.tokenizer_path)
        return import_source(layout, source, store_path(flags.target), settings, progress)
    from sparsekd.trainer.corpus.tokenizer import save_tokenizer, tokenizer_identity

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer(), Path(folder))
        identity = tokenizer_identity(tokenizer(), Path(folder), Path(flags.tokenizer).name)
        settings = _settings(flags, layout, identity, Path(folder))
        return import_source(layout, source, store_path(flags.target), settings, progress)


def _check_flags(flags: argparse.Namespace, layout: Format) -> None:
    of_formats = sorted({flag for item in FORMATS.values() for flag in item.flags})
    for flag in of_formats:
        if getattr(flags, flag) is not None and flag not in layout.flags:
            raise ConfigError(
                f"--{flag} does not belong to store import --format {layout.name}; leave it away."
            )
    if flags.tokens is None and flags.tokenizer is None:
        other = (
            ", or --tokens: a token store whose rows are the samples (versions 1 and 2)"
            if "tokens" in layout.flags
            else ""
        )
        raise ConfigError(
            f"store import --format {layout.name} needs --tokenizer: the folder or hub name of the tokenizer "
            f"that made the ids{other}."
        )
    for flag in ("tokenizer", "sequence_length"):
        if flags.tokens is not None and getattr(flags, flag) is not None:
            raise ConfigError(
                f"--{flag.replace('_', '-')} is the token store's where --tokens is given; leave it away."
            )
    if flags.split is not None and flags.tokens is None:
        raise ConfigError("--split is of the token store that --tokens names; leave it away.")


def _settings(
    flags: argparse.Namespace, layout: Format, tokenizer: TokenizerIdentity, files: Path
) -> ImportSettings:
    return ImportSettings(
        tokenizer=tokenizer,
        tokenizer_files=files,
        teacher=TeacherIdentity(
            name=flags.teacher_name,
            revision=flags.teacher_revision,
            weights_digest="unknown",
            dtype="unknown",
            logits_dtype="unknown",
            engine=f"imported from {layout.name}",
            versions={},
        ),
        codec=CodecSpec(flags.codec, {}),
        sequence_length=flags.sequence_length,
        k=flags.k,
        mask_short=flags.short == "mask",
        rows_per_shard=flags.rows_per_shard,
    )
