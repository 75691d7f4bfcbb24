"""`--multirun`: overrides with several values become several runs, in Hydra's own syntax."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override

from sparsekd.trainer.config.compose import check_for_verb, compose_config, groups
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.config.text import UNREADABLE, is_text, quoted, separate_texts, without_interpolation
from sparsekd.trainer.run.errors import ConfigError

MOST_RUNS = 1000

_NAMES = ("run.name", "run.root")


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep: its overrides, the swept ones among them by key, and what they compose to."""

    overrides: list[str]
    chosen: dict[str, str]
    config: Config


def swept_runs(overrides: Sequence[str], verb: str, *, config_directory: str | None = None) -> list[SweptRun]:
    """All combinations of swept values, the last one varying fastest, each with a run name of its own.

    Args:
        overrides: As typed, such as `objective.kd_weight=0.5,1.0` or `train.seed=range(3)`.
        verb: What each run is checked for.
        config_directory: A folder with groups of the user's own.

    Raises:
        ConfigError: Nothing is swept, more than 1,000 runs are named, or one of them has a fault.
    """
    keys, columns = [], []
    for word in overrides:
        key, values = _values(word)
        keys.append(key)
        columns.append(values)
    count = math.prod(map(len, columns))
    if count > MOST_RUNS:
        raise ConfigError(f"These overrides name {count:,} runs; a sweep has at most {MOST_RUNS:,}.")
    swept = [key for key, values in zip(keys, columns, strict=True) if len(values) > 1]
    if not swept:
        raise ConfigError(
            "--multirun needs a key with several values, such as objective.kd_weight=0.5,1.0; leave it away "
            "for one run."
        )
    runs = []
    for row in itertools.product(*columns):
        chosen = {key: value for key, value in zip(keys, row, strict=True) if key in swept}
        words = [
            word if len(values) == 1 else f"{word.partition('=')[0]}={value}"
            for word, value, values in zip(overrides, row, columns, strict=True)
        ]
        runs.append(SweptRun(words, chosen, compose_config(words, config_directory=config_directory)))
    for run in (named := _named(runs)):
        check_for_verb(run.config, verb)
    return named


def _values(word: str) -> tuple[str, list[str]]:
    """The key of an override and its values, each as it would be typed alone; one where it is not swept."""
    head, _, value = word.partition("=")
    key = head.lstrip("+~").partition("@")[0]
    known = groups()
    if is_text(key) and key not in known:
        return key, separate_texts(word)
    try:
        override: Override = OverridesParser.create().parse_override(word)
    except UNREADABLE:  # composing it says what is wrong
        return key, [value]
    if not override.is_sweep_override():
        return key, [value]
    swept = override.value()
    if isinstance(swept, Glob):
        values = swept.filter(known.get(key, []))
    elif override.is_discrete_sweep():
        values = list(itertools.islice(override.sweep_string_iterator(), MOST_RUNS + 1))
    else:
        values = []
    if not values:
        raise ConfigError(f"{word!r} names no values to try; write them as {key}=first,second.")
    return key, values


def _named(runs: list[SweptRun]) -> list[SweptRun]:
    """The runs with their folders told apart: what differs becomes a part of run.name."""
    tails = Counter(key.rpartition(".")[2] for key in runs[0].chosen)
    names = []
    for run in runs:
        parts = [run.config.run.name]
        for key, value in run.chosen.items():
            tail = key.rpartition(".")[2]
            if key not in _NAMES:
                parts.append(f"{tail if tails[tail] == 1 else key}={_in_name(value)}")
        names.append((run.config.run.root, "-".join(parts)))
    often = Counter(names)
    named = []
    for number, (run, place) in enumerate(zip(runs, names, strict=True)):
        root, name = place
        name = name if often[place] == 1 else f"{name}-{number}"
        config = replace(run.config, run=replace(run.config.run, root=root, name=name))
        word = f"run.name={quoted(without_interpolation(name))}"
        named.append(replace(run, overrides=[*run.overrides, word], config=config))
    return named


def _in_name(value: str) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", value).strip("-.")[-40:] or "none"
