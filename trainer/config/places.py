"""Where verbs put their results, also for the verbs that read them."""

from pathlib import Path

from sparsekd.trainer.config.schema import Config, run_folder


def export_folder(config: Config) -> Path:
    """Of the exported model: export.path, or `export` in the run's folder."""
    return Path(config.export.path or f"{run_folder(config)}/export")


def evaluation_folder(config: Config) -> Path:
    """Of the evaluation: evaluate.path, or `evaluation` in run.root."""
    return Path(config.evaluate.path or f"{config.run.root}/evaluation")


def report_page(config: Config) -> Path:
    """The report: report.path, or `report.html` in run.root."""
    return Path(config.report.path or f"{config.run.root}/report.html")
