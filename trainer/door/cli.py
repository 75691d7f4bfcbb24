"""The one door: `sparsekd VERB [overrides]`. Heavy libraries are imported by the verb that needs them."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from sparsekd.launch.env import torch_variables
from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.config.schema import Config, run_folder
from sparsekd.trainer.run.ending import run_as_process
from sparsekd.trainer.run.errors import ConfigError, FolderError, Stopped, TypedError, UserError, typed
from sparsekd.trainer.run.stop import STOPPED_CODE, watched

VERBS = {
    "plan": "tokens, bytes, shards, memory, hours and money, before any is spent (--probe measures)",
    "doctor": "versions and problems of this environment, each with its remedy",
    "generate": "prompts -> answers of a teacher, in process or from an endpoint, for prepare",
    "prepare": "text -> tokenized rows with document boundaries (a token store)",
    "capture": "teacher pass: token store -> logit store, by any number of ranks",
    "store": "inspect, verify, stats, compare, merge, subset, reencode, import, export",
    "train": "logit store -> student, with DeepSpeed ZeRO",
    "export": "checkpoint -> a folder that transformers loads without sparsekd",
    "evaluate": "teacher, student and baseline side by side on held-out rows",
    "report": "one HTML page: what was won, where, and how it was made",
}

PROBE = "plan.probe_rows=16"
"""What `plan --probe` says."""

EXAMPLES = """examples:
  sparsekd prepare corpus=jsonl 'corpus.paths=[data/*.jsonl]' corpus.tokenizer=models/teacher \\
      store.tokens=runs/a/tokens
  torchrun --nproc-per-node 8 --no-python sparsekd capture teacher.path=models/teacher store=hybrid \\
      store.tokens=runs/a/tokens store.path=runs/a/store
  sparsekd store inspect runs/a/store
  torchrun --nproc-per-node 8 --no-python sparsekd train store.path=runs/a/store student.path=models/small \\
      run.root=runs/a run.name=kd train.steps=2000
  sparsekd train experiment=demo objective=ce_only --cfg     (prints the configuration, runs nothing)
"""


def run() -> NoReturn:
    """The console script: `main` as all that a process does."""
    run_as_process(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0 done, 2 for something the user can put right, 75 stopped
    and saved, 130 ended by Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"sparsekd {metadata.version('sparsekd')}")
        return 0
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        return _dispatch(words[0], words[1:])
    except (UserError, StoreError) as error:
        if show_traceback:
            traceback.print_exc()
        rank, local_rank = _place()
        # What was typed is wrong everywhere, a folder for all ranks of a machine. What ranks found together
        # comes up on the first rank alone (see distributed.together); the rest one rank knows alone.
        is_said = isinstance(error, TypedError) and rank > 0
        is_said = is_said or (isinstance(error, FolderError) and local_rank > 0)
        if not is_said:
            who = f"rank {rank}: " if rank else ""
            print(f"sparsekd {words[0]}: {who}{error}", file=sys.stderr, flush=True)
        return 2
    except Stopped as stopped:
        if _place()[0] == 0:
            print(f"sparsekd {words[0]}: {stopped}; the same command goes on.", flush=True)
        return STOPPED_CODE
    except KeyboardInterrupt:
        return 130


def _place() -> tuple[int, int]:
    """This process's rank in the job and on its machine, by torchrun's variables or Slurm's."""
    try:
        variables = {**torch_variables(os.environ), **os.environ}
        return int(variables["RANK"]), int(variables.get("LOCAL_RANK", "0"))
    except (ValueError, KeyError):  # they contradict one another: `ranks` says how
        return 0, 0


def _dispatch(verb: str, words: list[str]) -> int:
    if verb not in VERBS:
        raise TypedError(f"{verb!r} is not a verb; there are {', '.join(VERBS)}.")
    if verb == "store":
        from sparsekd.trainer.door.store_cli import run_store

        return run_store(words)
    if "-h" in words or "--help" in words:
        print(_verb_help(verb))
        return 0
    if verb == "doctor":
        return _doctor(words)
    parser = argparse.ArgumentParser(prog=f"sparsekd {verb}", add_help=False, exit_on_error=False)
    parser.add_argument("--config-dir")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--run-folder", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    if verb == "plan":
        parser.add_argument("--probe", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    with typed():
        flags, overrides = _parse(parser, words)
        if verb == "plan" and flags.probe:
            overrides.insert(0, PROBE)  # whoever types the key as well means that
        if flags.multirun:
            from sparsekd.trainer.door.sweep import run_sweep

            return run_sweep(verb, overrides, config_directory=flags.config_dir, dry_run=flags.dry_run)
        from sparsekd.trainer.config.compose import as_yaml, check_for_verb, compose_config

        config = compose_config(overrides, config_directory=flags.config_dir)
        if flags.cfg:
            print(as_yaml(config), end="")
            return 0
        if flags.run_folder:
            print(run_folder(config))
            return 0
        check_for_verb(config, verb)
        if config.launch.scheduler == "none" and flags.dry_run:
            raise ConfigError("--dry-run shows the batch script of launch=slurm; add that, or leave it away.")
    if config.launch.scheduler == "slurm":
        from sparsekd.trainer.door.submit import run_submitted

        run_submitted(config, verb, [word for word in words if word != "--dry-run"], dry_run=flags.dry_run)
        return 0
    _run(verb, config, overrides)
    return 0


def _doctor(words: list[str]) -> int:
    """`doctor`, which takes one setting: run.root, whose disk it looks at, too."""
    from sparsekd.trainer.door.doctor import run

    other = next((word for word in words if word.partition("=")[0] != "run.root"), None)
    if other is not None:
        raise TypedError(f"doctor takes run.root=... alone, found {other}; leave it away.")
    if not words:
        return run()
    from sparsekd.trainer.config.compose import compose_config

    with typed():
        return run(Path(compose_config(words).run.root))


def _run(verb: str, config: Config, overrides: list[str]) -> None:
    if verb == "plan":
        from sparsekd.trainer.door.api import plan_of as run_verb
    elif verb in ("generate", "prepare", "capture"):
        # Around the imports, too: a signal may come while libraries are loaded.
        with watched(os.environ) as watch:
            if verb == "generate":
                from sparsekd.trainer.generation.generate import run as run_watched
            elif verb == "prepare":
                from sparsekd.trainer.corpus.prepare import run as run_watched
            else:
                from sparsekd.trainer.teacher.capture import run as run_watched
            run_watched(config, watch)
        return
    elif verb == "train":
        from sparsekd.trainer.student.train import run as run_train

        run_train(config, overrides)
        return
    elif verb == "export":
        from sparsekd.trainer.export.export import run as run_verb
    elif verb == "evaluate":
        from sparsekd.trainer.quality.evaluate import run as run_verb
    else:
        from sparsekd.trainer.report.report import run as run_verb
    run_verb(config)


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags by argparse, everything else as overrides; an unknown flag is one sentence."""
    try:
        flags, rest = parser.parse_known_args(words)
    except (argparse.ArgumentError, SystemExit) as error:
        raise ConfigError(f"{parser.prog}: {error}; see `{parser.prog} --help`.") from error
    for word in rest:
        if word.startswith("-"):
            raise ConfigError(f"{word} is not a flag of {parser.prog}; settings are given as key=value.")
    return flags, rest


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [
        "sparsekd: distil large language models from precomputed teacher logits",
        "",
        "usage: sparsekd VERB [key=value ...] [--config-dir DIR] [--cfg] [--multirun] [--dry-run]",
        "",
        *(f"  {verb:<{width}}  {purpose}" for verb, purpose in VERBS.items()),
        "",
        "  key=value     a setting; text is taken as typed, but for null where its type says None, quotes",
        "                around the whole value, and ${run.root} for another key's (docs/operations.md)",
        "  --cfg         print the composed configuration and stop",
        "  --multirun    train: one run for each combination of values such as train.seed=0,1",
        "  --dry-run     with launch=slurm or --multirun: show what would be started and stop",
        "  --run-folder  print the folder of the run and stop",
        "  --config-dir  a folder with configuration groups of your own",
        "  --traceback   show where an error arose",
        "",
        "`sparsekd VERB --help` lists the groups and every key with its default.",
        "",
        EXAMPLES,
    ]
    return "\n".join(lines)


# The sections of the configuration that each verb reads, or the keys, where it reads few of a section.
SECTIONS = {
    "plan": ("corpus", "store", "teacher", "student", "objective", "train", "engine", "launch", "plan"),
    "doctor": ("run.root",),
    "generate": (
        "generate", "generate.clean", "teacher", "corpus.chat_template_kwargs", "launch",
        "engine.timeout_minutes",
    ),
    "prepare": ("corpus", "store"),
    "capture": ("store", "teacher", "launch", "launch.slurm", "engine.timeout_minutes"),
    "train": (
        "run", "store", "student", "objective", "optimizer", "schedule", "engine", "train", "data",
        "tracking", "launch", "launch.slurm", "debug",
    ),
    "export": ("run", "export", "launch", "engine.timeout_minutes"),
    "evaluate": ("run", "store", "teacher", "student", "evaluate", "launch", "engine.timeout_minutes"),
    "report": (
        "run", "store", "teacher", "student", "evaluate.dtype", "report", "launch", "engine.timeout_minutes",
    ),
}  # fmt: skip


def _verb_help(verb: str) -> str:
    from sparsekd.trainer.door.settings_help import settings_lines

    return "\n".join([f"sparsekd {verb}: {VERBS[verb]}", "", *settings_lines(SECTIONS[verb]), "", EXAMPLES])


if __name__ == "__main__":
    run()
