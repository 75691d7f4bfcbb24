"""The settings of a corpus, and what can be wrong with them."""

import re
from dataclasses import dataclass
from string import Formatter
from typing import Any

from sparsekd.trainer.config.option import option
from sparsekd.trainer.run.errors import ConfigError


@dataclass
class CorpusConfig:
    format: str = option(
        "text", "What the paths hold (docs/data.md).", choices=("text", "jsonl", "csv", "parquet", "dataset")
    )
    paths: list[str] = option(
        [], "Files, folders or glob patterns; with format=dataset, saved dataset folders or hub names."
    )
    include: str = option(
        "*",
        "Pattern of file names taken from folders, searched recursively; hidden files are taken by name "
        "only, and .gz, .zst, .bz2 or .xz may stand behind the name.",
    )
    exclude: list[str] = option([], "Patterns of paths inside folders that are left out, such as '*/test/*'.")
    sample_by: str = option(
        "document",
        "With format=text, what one document is: document, a whole file; paragraph, the text between blank "
        "lines; line (the names of Hugging Face's reader of text).",
        choices=("document", "paragraph", "line"),
    )
    separator: str | None = option(
        None,
        r"With format=text: what stands between the documents of a file, such as <|endoftext|> or \n---\n "
        r"(\n: a line break), instead of corpus.sample_by.",
    )
    kind: str | None = option(
        None,
        "What a record holds: text; conversation, messages for the chat template; pair, a prompt and its "
        "completion; tokens, ids with labels or a mask. null goes by the first record's fields, and says so.",
        choices=("text", "conversation", "pair", "tokens"),
    )
    text_field: str = option(
        "text", "Field or column that holds a document's text; a.b is field b of the record in field a."
    )
    messages_field: str = option(
        "messages", "Field of a conversation's messages; where there is none of this name, conversations."
    )
    tools_field: str | None = option(
        "tools", "Field of the tools that the chat template gets, where a record has it; null for none."
    )
    system_field: str | None = option(
        "system",
        "Field of what the system says before the messages, where a record has it and they do not begin with "
        "it; null for none.",
    )
    prompt_field: str | None = option(
        None, "Field of a pair's prompt; null takes prompt, or else instruction and input."
    )
    completion_field: str | None = option(
        None, "Field of a pair's completion; null takes completion, or else output."
    )
    template: str | None = option(
        None,
        "Makes a pair's prompt of fields, as '{instruction}\\n\\n{input}\\n\\n' does, or a text of several, "
        "as '{title}\\n\\n{body}'; a paragraph whose fields are all empty is left out, \\n is a line break, "
        "{{ a brace.",
    )
    chat_template: str | None = option(
        None, "File with the chat template (Jinja), in place of the tokenizer's; it travels with the store."
    )
    chat_template_kwargs: dict[str, Any] = option(
        {},
        "Values that the chat template reads (transformers' name for it): {enable_thinking: false}, "
        "{date_string: 26 Jul 2024}.",
    )
    train_on: str = option(
        "assistant",
        "What the loss counts of conversations and pairs: assistant, each assistant turn or the completion; "
        "last, the last of these alone; all, questions too.",
        choices=("assistant", "last", "all"),
    )
    truncation: str = option(
        "split",
        "What happens to a document that is longer than a row: split, it goes on in the next row without "
        "what stood before; cut, the rest is left away; drop, it is left out.",
        choices=("split", "cut", "drop"),
    )
    invalid: str = option(
        "refuse",
        "What happens at a record that cannot be used, such as a conversation without an answer: refuse "
        "stops with a sentence; skip leaves it out, and counts.",
        choices=("refuse", "skip"),
    )
    delimiter: str | None = option(
        None, r"With format=csv: what stands between cells (\t: a tab); null goes by the name, .tsv or not."
    )
    weight_field: str | None = option(
        None,
        "Field or column that holds a document's weight in the loss, a number of 0 or more (0 leaves its "
        "tokens out of the loss); null weighs all alike. Held-out figures are unweighted.",
    )
    rationale_weight: float = option(
        1.0,
        "Weight, within an answer's own, of what was thought before it, between corpus.rationale_marks: 0 "
        "leaves it out of the loss. The marks themselves weigh as the answer does.",
        minimum=0.0,
    )
    rationale_marks: list[str] = option(
        ["<think>", "</think>"], "What stands before and behind a rationale in the text of an answer."
    )
    dataset_config: str | None = option(None, "Configuration name of a hub dataset.")
    dataset_split: str = option("train", "Split that is read from a dataset.")
    max_documents: int | None = option(None, "Take only the first so many documents.", minimum=1)
    tokenizer: str | None = option(None, "Tokenizer folder or hub name; usually the teacher's.")
    tokenizer_revision: str | None = option(None, "Revision of a hub tokenizer.")
    end_token: str | None = option(
        None,
        "Token that closes each document, by its text or id; null is the tokenizer's end-of-text token, "
        "which in a tokenizer for conversations is often the end of a turn (<|im_end|>).",
    )
    train_vocabulary_size: int | None = option(
        None,
        "Train a byte-level BPE tokenizer with so many entries on the training split instead.",
        minimum=257,
    )
    split_special_tokens: bool = option(
        True,
        "Text that spells a special token stays text; false makes it the control token, as text that a chat "
        "template wrote needs it (Hugging Face's name for it).",
    )
    allow: list[str] = option(
        [], "What `prepare` would refuse: json, text files that are JSON.", choices=("json",)
    )
    sequence_length: int = option(1024, "Tokens in one row.", minimum=2)
    packing: str = option(
        "documents",
        "documents: rows are filled with one document after another, which models must keep apart; none: "
        "each document begins a row, filled up with padding, for models that cannot (docs/models.md).",
        choices=("documents", "none"),
    )
    heldout_fraction: float = option(
        0.02, "Share of the documents held out, chosen by content hash.", minimum=0.0, maximum=0.9
    )
    heldout_paths: list[str] = option(
        [], "Held-out documents of their own, given as corpus.paths are; then none is chosen by hash."
    )
    heldout_split: str | None = option(
        None, "With format=dataset, the split that is held out; then no document is chosen by hash."
    )
    seed: int = option(0, "Seed of the held-out choice.", minimum=0)
    jobs: int = option(
        1,
        "Processes of this machine that encode documents and write shards; the store is the same with any "
        "number.",
        minimum=1,
        maximum=1024,
    )


def check_corpus(corpus: CorpusConfig) -> None:
    """Checks what does not depend on the files.

    Raises:
        ConfigError: naming keys, values and what is legal.
    """
    _check_kind(corpus)
    if corpus.heldout_split is not None:
        if corpus.format != "dataset":
            raise ConfigError(
                f"corpus.heldout_split={corpus.heldout_split} with corpus.format={corpus.format}: only "
                "datasets have splits; give files as corpus.heldout_paths."
            )
        if corpus.heldout_paths or corpus.heldout_split == corpus.dataset_split:
            other = "heldout_paths" if corpus.heldout_paths else "dataset_split"
            raise ConfigError(
                f"corpus.heldout_split={corpus.heldout_split} and corpus.{other}="
                f"{getattr(corpus, other)} contradict each other; set one place of held-out documents."
            )
    if corpus.weight_field is not None and corpus.format == "text":
        raise ConfigError(
            f"corpus.weight_field={corpus.weight_field} with corpus.format=text: a text file has no fields; "
            "use jsonl, csv, parquet or dataset, or leave corpus.weight_field away."
        )
    if len(corpus.rationale_marks) != 2 or not all(corpus.rationale_marks):
        raise ConfigError(
            f"corpus.rationale_marks={corpus.rationale_marks}: expected two texts, such as "
            "[<think>, </think>]."
        )
    if corpus.sample_by != "document" or corpus.separator is not None:
        cut = "sample_by" if corpus.separator is None else "separator"
        found = f"corpus.{cut}={getattr(corpus, cut)}"
        if corpus.format != "text":
            raise ConfigError(
                f"{found} with corpus.format={corpus.format}: there each record is a document; leave "
                f"corpus.{cut} away, or use corpus=text."
            )
        if corpus.sample_by != "document" and corpus.separator is not None:
            raise ConfigError(
                f"{found} and corpus.sample_by={corpus.sample_by} both say where documents end; set one."
            )
        if corpus.separator == "":
            raise ConfigError(
                "corpus.separator is empty, expected text; null cuts files by corpus.sample_by."
            )
    if corpus.delimiter is not None:
        if corpus.format != "csv":
            raise ConfigError(
                f"corpus.delimiter={corpus.delimiter} with corpus.format={corpus.format}: only csv has "
                "cells; use corpus=csv, or leave corpus.delimiter away."
            )
        delimiter = with_escapes(corpus.delimiter)
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise ConfigError(
                f"corpus.delimiter={corpus.delimiter!r}, expected one character other than a quote or a line "
                r"break, such as ; or | or \t for a tab."
            )


def is_weighted(corpus: CorpusConfig) -> bool:
    """Whether rows carry weights."""
    return corpus.weight_field is not None or corpus.rationale_weight != 1


def check_rationale_of(kind: str | None, corpus: CorpusConfig) -> None:
    """Checks that records of a kind, as `corpus.kind` names it, have answers to look for a rationale in.

    Raises:
        ConfigError: They have none.
    """
    if corpus.rationale_weight != 1 and kind not in ("conversation", "pair"):
        raise ConfigError(
            f"corpus.rationale_weight={corpus.rationale_weight:g} with corpus.kind={kind}: only "
            "conversations and pairs have answers; leave it away, or set corpus.kind."
        )


def check_tokenizer_of(kind: str | None, corpus: CorpusConfig) -> None:
    """Checks that there is a tokenizer for records of a kind, as `corpus.kind` names it.

    Raises:
        ConfigError: They need one that exists, and none is given.
    """
    if kind in ("conversation", "tokens") and corpus.tokenizer is None:
        raise ConfigError(
            f"corpus.kind={kind} needs corpus.tokenizer, whose "
            f"{'chat template writes it' if kind == 'conversation' else 'ids these are'}; a tokenizer that "
            "is trained here has none."
        )


def _check_kind(corpus: CorpusConfig) -> None:
    if corpus.format == "text" and corpus.kind not in (None, "text"):
        raise ConfigError(
            f"corpus.kind={corpus.kind} with corpus.format=text: a text file has no fields; use jsonl, csv, "
            "parquet or dataset."
        )
    check_tokenizer_of(corpus.kind, corpus)
    taken = {"messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt"}
    taken |= {"continue_final_message", "return_assistant_tokens_mask"}
    for name in corpus.chat_template_kwargs:
        if not str(name).isidentifier() or name in taken:
            raise ConfigError(
                f"corpus.chat_template_kwargs has the name {name!r}, expected those of variables that the "
                "template reads beside messages and tools, such as enable_thinking."
            )
    if corpus.template is None:
        return
    if corpus.format == "text":
        raise ConfigError(
            f"corpus.template={corpus.template!r} with corpus.format=text: a text file has no fields; "
            "use jsonl, csv, parquet or dataset, or leave corpus.template away."
        )
    check_template(corpus.template, "corpus.template")
    if corpus.prompt_field is not None:
        raise ConfigError(
            f"corpus.template and corpus.prompt_field={corpus.prompt_field} both say what the prompt is; "
            "set one."
        )


def check_template(template: str, key: str) -> None:
    """Checks a template that makes a text of a record's fields.

    Raises:
        ConfigError: It cannot be read, or names no field; the message calls it `key`.
    """
    try:
        fields = [(name, spec, how) for _, name, spec, how in Formatter().parse(template)]
    except ValueError as error:
        raise ConfigError(
            f"{key}={template!r} cannot be read ({error}); {{{{ and }}}} are braces."
        ) from error
    named = [name for name, _, _ in fields if name is not None]
    if not named or not all(named) or any(spec or how for _, spec, how in fields):
        raise ConfigError(
            f"{key}={template!r}, expected names of fields in braces, such as "
            "{instruction}, and nothing else in them."
        )


def with_escapes(text: str) -> str:
    r"""Text in which `\n`, `\r`, `\t` and `\\` stand for a line break, a return, a tab and a backslash."""
    meaning = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda found: meaning[found[1]], text)
