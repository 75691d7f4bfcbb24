"""The verbs as functions, for notebooks and drivers: what the command line runs, with errors as exceptions.

Every function takes overrides as they are typed (`["store.path=runs/a/store", "train.steps=100"]`), or a
configuration that `compose` returned, whose fields may have been set since.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekd.trainer.config.compose import check_for_verb, checked_again, compose_config
from sparsekd.trainer.config.places import evaluation_folder, export_folder, report_page
from sparsekd.trainer.config.schema import Config, run_folder
from sparsekd.trainer.run.errors import ConfigError

if TYPE_CHECKING:
    from sparsekd.trainer.quality.result import Evaluation

Settings = Sequence[str] | Config


def compose(overrides: Sequence[str] = (), *, config_directory: str | None = None) -> Config:
    """A typed configuration: the defaults, groups and overrides, each value checked by itself.

    Args:
        overrides: Such as `objective=ce_only` or `train.steps=100`.
        config_directory: A folder with configuration groups of your own.

    Raises:
        UserError: One sentence that names the key, the value and what is legal.
    """
    return compose_config(_words(overrides), config_directory=config_directory)


def plan(settings: Settings) -> None:
    """Prints tokens, bytes, shards, memory, hours and money, before any is spent.

    With `plan.probe_rows` the teacher records some rows for it.

    Raises:
        UserError: Something that the user can put right, as for every verb.
        StoreError: A store cannot be read, likewise.
    """
    plan_of(_ready("plan", settings))


def plan_of(config: Config) -> None:
    """`plan`, of a configuration that is checked."""
    from sparsekd.trainer.planning.plan import run

    if not config.plan.probe_rows:
        run(config)
        return
    from sparsekd.trainer.teacher.trial import measured

    run(config, measured(config))


def generate(settings: Settings) -> Path:
    """Asks a teacher for answers to prompts; returns the folder of the conversations, for `prepare`."""
    config = _ready("generate", settings)
    from sparsekd.trainer.generation.generate import DATA_NAME, run

    with _own_excepthook():
        run(config)
    return Path(str(config.generate.path), DATA_NAME)


def prepare(settings: Settings) -> str:
    """Tokenizes a corpus; returns the place of the token store."""
    from sparsekd.trainer.corpus.prepare import run

    config = _ready("prepare", settings)
    run(config)
    return str(config.store.tokens)


def capture(settings: Settings) -> str:
    """Runs the teacher over a token store; returns the place of the logit store."""
    config = _ready("capture", settings)
    from sparsekd.trainer.teacher.capture import run

    with _own_excepthook():
        run(config)
    return str(config.store.path)


def train(settings: Settings) -> Path:
    """Trains a student, from the newest checkpoint of its run folder or from the start; returns that folder.

    Trainings may follow one another in a process, but not run at the same time.
    """
    config = _ready("train", settings)
    from sparsekd.trainer.student.train import run

    with _own_excepthook():
        run(config, [] if isinstance(settings, Config) else list(settings))
    return Path(run_folder(config))


def export(settings: Settings) -> Path:
    """Writes a checkpoint as a folder that transformers loads without sparsekd; returns the folder."""
    config = _ready("export", settings)
    from sparsekd.trainer.export.export import run

    with _own_excepthook():
        run(config)
    return export_folder(config)


def evaluate(settings: Settings) -> "Evaluation":
    """Judges teacher, student and baseline side by side on held-out rows; returns the figures."""
    config = _ready("evaluate", settings)
    from sparsekd.trainer.quality.evaluate import run
    from sparsekd.trainer.quality.result import load_evaluation

    with _own_excepthook():
        run(config)
    return load_evaluation(evaluation_folder(config))


def report(settings: Settings) -> Path:
    """Writes one HTML page on what was won, where, and how it was made; returns its place."""
    config = _ready("report", settings)
    from sparsekd.trainer.report.report import run

    with _own_excepthook():
        run(config)
    return report_page(config)


def _ready(verb: str, settings: Settings) -> Config:
    """The configuration, with everything checked that needs no model.

    Raises:
        ConfigError: naming the key, the value and what is legal.
    """
    config = checked_again(settings) if isinstance(settings, Config) else compose_config(_words(settings))
    check_for_verb(config, verb)
    return config


def _words(overrides: Sequence[str]) -> list[str]:
    if isinstance(overrides, str):
        raise ConfigError(f"{overrides!r} is one text; give a list of them: [{overrides!r}].")
    return list(overrides)


@contextmanager
def _own_excepthook() -> Iterator[None]:
    """torch sets another hook for each process group, around the one before, and leaves it there."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook
