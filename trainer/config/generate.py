"""The settings of `generate`, and what can be wrong with them."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from sparsekd.trainer.config.corpus import check_template
from sparsekd.trainer.config.option import option
from sparsekd.trainer.run.errors import ConfigError

SAMPLING_FIELDS = ("seed", "temperature", "top_p", "max_tokens")
"""Fields of a request that have a key of their own; null leaves them away, where an endpoint refuses them."""

REQUEST_FIELDS = ("model", "messages", "tools", "n", "stream", *SAMPLING_FIELDS)
"""Fields of a request that are no user's to set."""


@dataclass
class CleanConfig:
    cut_off: str = option(
        "drop", "Answers that generate.max_tokens cut short: drop or keep.", choices=("drop", "keep")
    )
    rationale: str = option(
        "keep",
        "What was thought before the answer: keep it as reasoning_content, which the chat template may "
        "write, or drop it.",
        choices=("keep", "drop"),
    )
    min_characters: int = option(1, "Answers with fewer characters are left out.", minimum=0)
    max_characters: int | None = option(None, "Answers with more characters are left out.", minimum=1)
    repetition: float = option(
        0.5,
        "Answers in which a larger share of all stretches of 16 characters stood before are left out; 1 for "
        "none.",
        minimum=0.0,
        maximum=1.0,
    )
    refusals: list[str] = option(
        [],
        "Regular expressions; answers in whose first 300 characters one is found, in any case, are left out: "
        "['^i.?m sorry', 'as an ai'].",
    )
    languages: list[str] = option(
        [],
        "Languages, by their codes ([en, de]): answers in another one are left out; code between fences and "
        "answers of fewer than 40 letters are not looked at. Needs pip install 'sparsekd[clean]'.",
    )
    duplicates: str = option(
        "exact",
        "Answers that are left out: exact, where question and answer stood before, up to case and spaces; "
        "near, also those whose text is like an earlier one's (MinHash; pip install 'sparsekd[clean]', and "
        "2 kB of memory an answer); none.",
        choices=("exact", "near", "none"),
    )
    near_similarity: float = option(
        0.8,
        "With duplicates=near: the share of stretches of 9 characters that two answers have in common from "
        "which on they are alike.",
        minimum=0.05,
        maximum=1.0,
    )
    filter: str | None = option(
        None,
        "A Python function of one's own as module:function. It is given each record that is left, and "
        "returns true, false, or a number: the weight of the conversation, 0 to leave it out.",
    )


@dataclass
class GenerateConfig:
    path: str | None = option(None, "Folder of the answers: raw/ as they came, data/ for `prepare`.")
    prompts: list[str] = option(
        [], "Prompts: files, folders or glob patterns of JSON lines, or of lines with generate.format=lines."
    )
    format: str = option(
        "jsonl",
        "What the prompts' files hold: jsonl, records with prompt, messages or instruction and input "
        "(self-instruct); lines, a topic each, for generate.template.",
        choices=("jsonl", "lines"),
    )
    template: str | None = option(
        None,
        "Makes a prompt of a record's fields, or of {topic}, a line: 'Write a story about {topic}.'; a "
        "paragraph whose fields are all empty is left out, \\n is a line break, {{ a brace.",
    )
    system: str | None = option(None, "System message before each prompt that has none.")
    max_prompts: int | None = option(None, "Take only the first so many prompts.", minimum=1)
    answers: int = option(1, "Answers to each prompt.", minimum=1, maximum=10_000)
    seed: int = option(
        0, "Seed of the answers; each has one of its own, of this, the prompt and its number.", minimum=0
    )
    temperature: float = option(
        0.7, "Temperature of sampling; 0 takes the most likely token.", minimum=0.0, maximum=100.0
    )
    top_p: float = option(
        1.0, "Sample from the most likely tokens that have this probability.", minimum=0.0, maximum=1.0
    )
    max_tokens: int = option(1024, "Tokens of an answer, at most.", minimum=1)
    batch_rows: int = option(8, "In process: answers that are made at a time.", minimum=1)
    endpoint: str | None = option(
        None,
        "Address of an OpenAI-compatible server, such as http://host:8000/v1, which answers instead of "
        "teacher.path.",
    )
    model: str | None = option(None, "Name by which the endpoint knows its model.")
    key_variable: str | None = option(
        None, "Environment variable that holds the endpoint's key; the key itself is written nowhere."
    )
    request: dict[str, Any] = option(
        {},
        "Further fields of each request to the endpoint, such as {top_k: 20, reasoning_effort: low}; null "
        "leaves one of seed, temperature, top_p and max_tokens away, for endpoints that refuse it.",
    )
    concurrency: int = option(16, "Requests to the endpoint at one time.", minimum=1, maximum=4096)
    timeout_seconds: float = option(
        300.0, "An answer of the endpoint that takes longer is asked for again.", minimum=0.01
    )
    retries: int = option(
        6, "How often an answer is asked for again, each time after a longer wait.", minimum=0, maximum=1000
    )
    failed: str = option(
        "refuse",
        "What happens where a prompt gets no answer: refuse ends with a sentence, once all others have "
        "theirs, and the same command asks again; skip leaves the answer out, and counts.",
        choices=("refuse", "skip"),
    )
    clean: CleanConfig = field(default_factory=CleanConfig)
    prompts_per_part: int = option(256, "Prompts whose answers stand in one file.", minimum=1)


def check_generate(config: GenerateConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Checks what does not depend on files.

    Raises:
        ConfigError: naming keys, values and what is legal.
    """
    if config.template is not None:
        check_template(config.template, "generate.template")
    elif config.format == "lines":
        raise ConfigError(
            "generate.format=lines needs generate.template, which makes a prompt of each line, such as "
            "'Write a story about {topic}.'."
        )
    _check_clean(config.clean)
    if config.top_p == 0:
        raise ConfigError("generate.top_p=0 leaves no token; generate.temperature=0 takes the most likely.")
    if config.endpoint is None:
        named = [name for name in ("model", "key_variable") if getattr(config, name) is not None]
        named += ["request"] if config.request else []
        if named:
            raise ConfigError(
                f"generate.{named[0]} speaks of an endpoint, and generate.endpoint is not set; set it, or "
                f"leave generate.{named[0]} away."
            )
        return
    _check_endpoint(config, environment)


def _check_clean(clean: CleanConfig) -> None:
    for pattern in clean.refusals:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"generate.clean.refusals holds {pattern!r}, which is no regular expression ({error})."
            ) from error
    if clean.max_characters is not None and clean.max_characters < clean.min_characters:
        raise ConfigError(
            f"generate.clean.max_characters={clean.max_characters} is below generate.clean.min_characters="
            f"{clean.min_characters}, which leaves no answer."
        )
    if clean.filter is not None and not re.fullmatch(r"[\w.]+:[\w.]+", clean.filter):
        raise ConfigError(
            f"generate.clean.filter={clean.filter}, expected module:function, such as my_filters:is_good."
        )


def _check_endpoint(config: GenerateConfig, environment: Mapping[str, str]) -> None:
    assert config.endpoint is not None
    try:
        parts = urlsplit(config.endpoint)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, valid = None, False
    # Not shown where it holds a password.
    if parts is not None and (parts.username or parts.password):
        raise ConfigError(
            "generate.endpoint holds a user or password; the key comes from the environment variable that "
            "generate.key_variable names."
        )
    if not valid or parts is None or parts.query or parts.fragment:
        raise ConfigError(
            f"generate.endpoint={config.endpoint} is no address of the form http://host:8000/v1, to which "
            "/chat/completions is added."
        )
    if config.model is None:
        raise ConfigError("generate.endpoint needs generate.model, the name by which it knows its model.")
    for name, value in config.request.items():
        if name in REQUEST_FIELDS and not (value is None and name in SAMPLING_FIELDS):
            raise ConfigError(
                f"generate.request has the field {name}, which sparsekd sets itself"
                + (f" by generate.{name}; set that." if hasattr(config, name) else "; leave it away.")
            )
    variable = config.key_variable
    if variable is None:
        return
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ConfigError(
            "generate.key_variable is not the name of an environment variable, such as OPENAI_API_KEY; the "
            "key itself is not typed."
        )
    key = environment.get(variable, "")
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        found = "holds something else than a key" if key else "is not set"
        raise ConfigError(
            f"The environment variable {variable}, which generate.key_variable names, {found}; export it "
            "with the endpoint's key."
        )
