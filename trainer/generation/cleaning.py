"""Rules by which answers are left out, and the records of those that are kept."""

import copy
import hashlib
import math
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsekd.logit_store.errors import first_line
from sparsekd.trainer.config.generate import CleanConfig
from sparsekd.trainer.corpus.findings import Tally
from sparsekd.trainer.generation.answers import LENGTH
from sparsekd.trainer.generation.language import Languages
from sparsekd.trainer.generation.near import NearDuplicates
from sparsekd.trainer.run.errors import ConfigError, UserError

_STRETCH = 16
"""Characters of a stretch that repeats: a few words of any language."""

_LOOKED_AT = 100_000
"""Characters of an answer in which repetition is looked for."""

_HEAD = 300
"""Characters of an answer in which a refusal is looked for."""

Rule = Callable[[dict[str, Any]], bool]
"""Whether an answer is left out."""


class Cleaning:
    """Goes over answers in their order and leaves some out.

    Args:
        config: The rules.

    Attributes:
        left_out: By rule, how many and the first.
        kept: How many are kept.

    Raises:
        ConfigError: The filter, or the library for near duplicates or languages, cannot be imported.
    """

    def __init__(self, config: CleanConfig) -> None:
        self._config = config
        self._refusals = [re.compile(pattern, re.IGNORECASE) for pattern in config.refusals]
        self._seen: set[bytes] = set()
        self._near = NearDuplicates(config.near_similarity) if config.duplicates == "near" else None
        self._languages = Languages(config.languages) if config.languages else None
        self._filter = None if config.filter is None else _imported(config.filter)
        self.left_out: dict[str, Tally] = {}
        self.kept = 0

    def records(self, answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The conversations that are kept, each with its weight, as `prepare` reads them.

        Args:
            answers: As the raw files hold them.

        Raises:
            UserError: The filter fails, or returns something else than it may.
        """
        for answer in answers:
            place = f"{answer['place']}, answer {answer['sample']}"
            rule = next((name for name, is_so in self._rules() if is_so(answer)), None)
            record = None if rule else conversation_of_answer(answer, self._config)
            if record is not None and self._filter is not None:
                record["weight"] = _weight(self._filter, record, str(self._config.filter), place)
                rule = None if record["weight"] else "filter"
            if rule is not None or record is None:
                self.left_out.setdefault(str(rule), Tally()).add(place)
                continue
            self.kept += 1
            yield record

    def _rules(self) -> list[tuple[str, Rule]]:
        """In the order in which they are asked; the last ones remember what they have seen."""
        return [
            ("no answer", lambda answer: answer["answer"] is None),
            ("cut off", self._is_cut_off),
            ("empty", _is_empty),
            (
                "too short",
                lambda answer: self._is_text(answer) and len(_text(answer)) < self._config.min_characters,
            ),
            ("too long", self._is_too_long),
            ("repetition", lambda answer: repetition_of(_text(answer)) > self._config.repetition),
            ("refusal", self._is_refusal),
            ("another language", self._is_in_another_language),
            ("exact duplicate", self._is_duplicate),
            ("near duplicate", self._is_near_duplicate),
        ]

    def _is_cut_off(self, answer: dict[str, Any]) -> bool:
        return self._config.cut_off == "drop" and answer["finish_reason"] == LENGTH

    def _is_text(self, answer: dict[str, Any]) -> bool:
        """Whether an answer is to be judged as text: calls of tools may stand alone."""
        return not answer["answer"].get("tool_calls")

    def _is_too_long(self, answer: dict[str, Any]) -> bool:
        most = self._config.max_characters
        return most is not None and len(_text(answer)) > most

    def _is_refusal(self, answer: dict[str, Any]) -> bool:
        head = _text(answer).lstrip()[:_HEAD]
        return any(pattern.search(head) for pattern in self._refusals)

    def _is_in_another_language(self, answer: dict[str, Any]) -> bool:
        return self._languages is not None and self._languages.is_another(_text(answer))

    def _is_duplicate(self, answer: dict[str, Any]) -> bool:
        if self._config.duplicates == "none":
            return False
        said = [*(message.get("content") or "" for message in answer["messages"]), _text(answer)]
        said.append(repr(answer["answer"].get("tool_calls")))
        digest = hashlib.sha256(
            "\0".join(" ".join(text.split()).casefold() for text in said).encode()
        ).digest()
        if digest in self._seen:
            return True
        self._seen.add(digest)
        return False

    def _is_near_duplicate(self, answer: dict[str, Any]) -> bool:
        return self._near is not None and self._near.is_like_another(_text(answer))


def conversation_of_answer(answer: dict[str, Any], config: CleanConfig) -> dict[str, Any]:
    """The record of an answer: its conversation, of which the answer alone is learned, and its weight."""
    message = dict(answer["answer"])
    if config.rationale == "drop":
        message.pop("reasoning_content", None)
    given = [one | {"weight": 0} if one["role"] == "assistant" else one for one in answer["messages"]]
    record = {
        "id": f"{answer['prompt'][:16]}-{answer['sample']}",
        "messages": [*given, message],
        "weight": 1.0,
    }
    if "tools" in answer:
        record["tools"] = answer["tools"]
    return record


def repetition_of(text: str) -> float:
    """The share of a text's stretches of 16 characters that stood in it before; spaces count as one."""
    text = " ".join(text.split())[:_LOOKED_AT]
    stretches = len(text) - _STRETCH + 1
    if stretches < 2:
        return 0.0
    return 1 - len({text[start : start + _STRETCH] for start in range(stretches)}) / stretches


def _text(answer: dict[str, Any]) -> str:
    return str(answer["answer"].get("content") or "")


def _is_empty(answer: dict[str, Any]) -> bool:
    return not _text(answer).strip() and not answer["answer"].get("tool_calls")


def _imported(name: str) -> Callable[[dict[str, Any]], Any]:
    """The function module:function, also of a module beside which the command was started."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # whatever a module does when it is imported
        raise ConfigError(
            f"generate.clean.filter={name} cannot be imported ({type(error).__name__}: {first_line(error)})."
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(
            f"generate.clean.filter={name} is of type {type(found).__name__}, expected a function."
        )
    function: Callable[[dict[str, Any]], Any] = found
    return function


def _weight(
    function: Callable[[dict[str, Any]], Any], record: dict[str, Any], name: str, place: str
) -> float:
    try:
        value = function(copy.deepcopy(record))
    except Exception as error:
        raise UserError(
            f"generate.clean.filter={name} failed at {place} ({type(error).__name__}: "
            f"{first_line(error)}); mend it, then run the same command again: no answer is asked for again."
        ) from error
    if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
        return float(value)
    raise UserError(
        f"generate.clean.filter={name} returned {value!r} at {place}, expected true, false, or a weight of "
        "0 or more."
    )
