"""`report`: one HTML page that needs nothing but itself: what was won, where, and how it was made."""

from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging as transformers_logging

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.trainer.config.places import evaluation_folder, report_page
from sparsekd.trainer.config.schema import Config, ReportConfig
from sparsekd.trainer.models.source import judged_source, teacher_source
from sparsekd.trainer.quality.result import Evaluation, load_evaluation
from sparsekd.trainer.quality.table import headline, result_table
from sparsekd.trainer.report.continuations import Continuation, continuations
from sparsekd.trainer.run.console import size_text
from sparsekd.trainer.run.errors import ConfigError, DataError
from sparsekd.trainer.run.files import write_whole
from sparsekd.trainer.run.ranks import one_process
from sparsekd.trainer.run.tracking import METRICS_NAME

# What the extra `eval` brings.
_EXTRA = ("jinja2", "markupsafe", "matplotlib")


def run(config: Config) -> None:
    """Writes the page.

    Raises:
        ConfigError: The packages that draw it are not installed, or ranks are several.
        DataError: There is no evaluation, or a run folder cannot be read.
    """
    render = _render_function()
    transformers_logging.disable_progress_bar()
    folder = Path(config.report.evaluation or evaluation_folder(config))
    evaluation = load_evaluation(folder)
    runs = _runs(config.report, evaluation)
    samples = _samples(config, evaluation) if config.report.continuations else []
    page = render(evaluation, runs, samples, title=config.report.title)
    place = report_page(config)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, page)
    print(result_table(evaluation))
    print(headline(evaluation))
    print(f"written: {place} ({size_text(place.stat().st_size)}, needs no network)")
    print(f"next: python3 -m webbrowser -t {place}", flush=True)


def _render_function() -> Callable[..., str]:
    """The page's renderer, whose packages are an extra."""
    try:
        from sparsekd.trainer.report.page import render
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise ConfigError(
            f"report needs {error.name}, which is not installed: pip install 'sparsekd[eval]'."
        ) from error
    return render


def _runs(settings: ReportConfig, evaluation: Evaluation) -> dict[str, Path]:
    """report.runs, or else the folders around the judged models that hold metrics."""
    if settings.runs:
        return {name: Path(folder) for name, folder in settings.runs.items()}
    found = {
        model.name: Path(model.path).parent
        for model in evaluation.models
        if model.path is not None and (Path(model.path).parent / METRICS_NAME).is_file()
    }
    if found:
        names = ", ".join(f"{name}: {folder}" for name, folder in found.items())
        print(f"report.runs is not set; curves are drawn from {{{names}}}", flush=True)
    return found


def _samples(config: Config, evaluation: Evaluation) -> list[Continuation]:
    store = open_store(config.store.path or evaluation.store["path"])
    if store.digest != evaluation.store["digest"]:
        raise DataError(
            f"store.path={store.path} is not the store of the evaluation (digest {store.digest[:12]}, "
            f"expected {evaluation.store['digest'][:12]}); name that one, or set report.continuations=0."
        )
    sources = {
        model.name: judged_source(config.student, model.name, model.path)
        for model in evaluation.models
        if model.path is not None and model.role != "teacher"
    }
    known = evaluation.model("teacher")
    path = config.teacher.path or (known.path if known is not None else None)
    if path is not None:
        sources = {"teacher": teacher_source(config.teacher, path), **sources}
    with one_process(config.launch, timeout_minutes=config.engine.timeout_minutes, what="report") as job:
        return continuations(
            store,
            sources,
            prompts=config.report.continuations,
            new_tokens=config.report.continuation_tokens,
            rows=evaluation.store["rows"],
            dtype=config.evaluate.dtype,
            device=job.device,
        )
