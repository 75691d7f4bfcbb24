"""`sparsekd store ACTION ...`: what each action is asked for, and what it says at the end.

Nothing here imports torch, except through `verify --teacher`; each action's own work is in `logit_store`.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sparsekd.logit_store.manifest import read_manifest
from sparsekd.logit_store.places.files import exists
from sparsekd.logit_store.places.paths import StorePath, store_path
from sparsekd.logit_store.protocol.layout import INDEX_NAME
from sparsekd.trainer.config.schema import Config, StoreConfig, require
from sparsekd.trainer.run.console import ProgressLine
from sparsekd.trainer.run.errors import ConfigError, TypedError, typed

if TYPE_CHECKING:
    from sparsekd.logit_store.tools.verify import VerifyResult

SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
"""Words that are key=value settings, and no paths."""

SHORT = ("refuse", "mask")


@dataclass(frozen=True)
class Action:
    """One action of the verb `store`.

    Attributes:
        purpose: one line for the overview.
        arguments: adds its flags to a parser.
        run: does it, and returns the exit code.
        settings: sections of the configuration that it reads from key=value settings.
        details: returns what its help says behind the flags.
    """

    purpose: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], int]
    settings: tuple[str, ...] = ()
    details: Callable[[], str] | None = None


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise TypedError(f"{self.prog}: {message}; see `{self.prog} --help`.")


def run_store(words: Sequence[str]) -> int:
    """Runs `sparsekd store` with the words behind it; returns the exit code.

    Raises:
        ConfigError: something that was typed is wrong.
        StoreError: a store is, or cannot be written.
    """
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, rest = words[0], list(words[1:])
    if name not in ACTIONS:
        raise TypedError(f"store {name!r} is not an action; there are {', '.join(ACTIONS)}.")
    action = ACTIONS[name]
    parser = _Parser(prog=f"sparsekd store {name}", description=action.purpose, allow_abbrev=False)
    action.arguments(parser)
    if "-h" in rest or "--help" in rest:
        print(parser.format_help(), end="")
        if action.details is not None:
            print("", action.details(), sep="\n")
        if action.settings:
            from sparsekd.trainer.door.settings_help import settings_lines

            print("", *settings_lines(action.settings), sep="\n")
        return 0
    settings = [word for word in rest if SETTING.match(word)]
    if settings and not action.settings:
        raise TypedError(
            f"store {name} takes no settings, found {' '.join(settings)}; only store verify PATH --teacher "
            "does."
        )
    flags, unknown = parser.parse_known_args([word for word in rest if word not in settings])
    if unknown:
        raise TypedError(_about_unknown(name, unknown[0]))
    return action.run(flags, settings)


def _about_unknown(name: str, word: str) -> str:
    """Returns the sentence about a word that an action does not take."""
    flag = word.partition("=")[0]
    owners = []
    for other, action in ACTIONS.items():
        parser = _Parser(allow_abbrev=False)
        action.arguments(parser)
        if flag in parser.format_help().replace(",", " ").split():
            owners.append(other)
    if word.startswith("-") and owners:
        return f"{flag} belongs to store {', '.join(owners)}, not to store {name}; leave it away."
    kind = "a flag" if word.startswith("-") else "expected behind its paths"
    return f"{word} is not {kind} of store {name}; see `sparsekd store {name} --help`."


def overview() -> str:
    """Returns the help of the verb."""
    width = max(map(len, ACTIONS))
    return "\n".join(
        [
            "sparsekd store: look at stores, check them, and make new ones from them",
            "",
            "usage: sparsekd store ACTION PATH ... [--flags]",
            "",
            *(f"  {name:<{width}}  {action.purpose}" for name, action in ACTIONS.items()),
            "",
            "`sparsekd store ACTION --help` lists the flags. What writes a store writes a new one, as its "
            "last path;",
            "cut off, the same command goes on with it. docs/store.md tells more.",
        ]
    )


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a store")
    parser.add_argument("--positions", type=_at_least(0), default=4, help="decoded positions to show (4)")
    parser.add_argument("--rows", type=_at_least(1), default=64, help="rows of each split to read (64)")


def _inspect(flags: argparse.Namespace, _: list[str]) -> int:
    from sparsekd.logit_store.tools.inspect import inspect_text
    from sparsekd.logit_store.tools.unfinished import unfinished_text

    path = store_path(flags.path)
    if not exists(path / INDEX_NAME):
        print(unfinished_text(path))
        print("next: the command that writes it goes on with it")
        return 0
    print(inspect_text(path, positions=flags.positions, sample_rows=flags.rows))
    print(f"next: sparsekd store verify {flags.path}")
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a store")
    parser.add_argument(
        "--teacher", action="store_true", help="run the teacher again on some rows and compare"
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="capture damaged shards again, with teacher.path and store.tokens",
    )
    parser.add_argument(
        "--reseal", action="store_true", help="with --repair: take shards that come out different"
    )
    _jobs(parser, "read shards")


def _verify(flags: argparse.Namespace, settings: list[str]) -> int:
    from sparsekd.logit_store.tools.verify import verify_store

    if settings and not (flags.teacher or flags.repair):
        raise TypedError(
            f"store verify takes no settings, found {' '.join(settings)}; only store verify PATH --teacher "
            "or --repair does."
        )
    if flags.reseal and not flags.repair:
        raise TypedError("--reseal says what --repair may do; give both, or neither.")
    config = None
    if flags.teacher or flags.repair:
        from sparsekd.trainer.config.compose import compose_config

        with typed():
            config = compose_config(settings)
    with ProgressLine("store verify") as progress:
        result = verify_store(flags.path, jobs=flags.jobs, progress=progress)
    print(result.text())
    if not result.ok and not flags.repair:
        return 2
    if config is not None and (flags.teacher or not result.ok):
        return _with_teacher(flags, config, result)
    print(f"next: {_next_of_store(flags.path)}")
    return 0


def _with_teacher(flags: argparse.Namespace, config: Config, found: "VerifyResult") -> int:
    """Runs what needs the teacher's model, which says itself what comes next."""
    if flags.repair and not found.ok:
        from sparsekd.trainer.teacher.repair import run as run_repair

        run_repair(config, found, reseal=flags.reseal)
        return 0
    from sparsekd.trainer.teacher.verify import run as run_verify

    with typed():
        require(config.teacher.path, "teacher.path", "by store verify --teacher")
    run_verify(config, flags.path)
    return 0


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a store")
    parser.add_argument("--split", help="this split only")
    parser.add_argument("--rows", type=_at_least(1), help="rows of each split to read, spread evenly (all)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it, too; needs matplotlib")
    _jobs(parser, "read rows")


def _stats(flags: argparse.Namespace, _: list[str]) -> int:
    from sparsekd.logit_store.tools.stats import store_stats

    with ProgressLine("store stats") as progress:
        stats = store_stats(
            store_path(flags.path), split=flags.split, rows=flags.rows, jobs=flags.jobs, progress=progress
        )
    print(stats.text())
    if flags.plot:
        from sparsekd.logit_store.tools.stats_plot import plot_stats

        plot_stats(stats, Path(flags.plot))
        print(f"plot: {flags.plot}")
    print(f"next: {_next_of_store(flags.path)}")
    return 0


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="a store")
    parser.add_argument("second", help="a store over the same text")
    parser.add_argument("--rows", type=_at_least(1), help="rows of each split to read, spread evenly (all)")


def _compare(flags: argparse.Namespace, _: list[str]) -> int:
    from sparsekd.logit_store.tools.compare import compare_stores

    with ProgressLine("store compare") as progress:
        result = compare_stores(
            store_path(flags.first), store_path(flags.second), rows=flags.rows, progress=progress
        )
    print(result.text() + "\n")
    print(f"next: sparsekd store stats {flags.second}")
    return 0


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="SOURCE ... NEW", help="two stores or more, then the new one"
    )
    parser.add_argument(
        "--allow-repeated-rows", action="store_true", help="take rows with equal tokens more than once"
    )
    _jobs(parser, "look at rows and write shards")


def _merge(flags: argparse.Namespace, _: list[str]) -> int:
    from sparsekd.logit_store.tools.combine import merge_stores

    *sources, target = (store_path(path) for path in flags.paths)
    if len(sources) < 2:
        raise ConfigError("store merge needs two stores or more and, as the last path, the new one.")
    with ProgressLine("store merge") as progress:
        digest = merge_stores(
            sources,
            target,
            allow_repeated_rows=flags.allow_repeated_rows,
            jobs=flags.jobs,
            progress=progress,
        )
    return _made(target, digest)


def _subset_arguments(parser: argparse.ArgumentParser) -> None:
    _source_and_target(parser)
    parser.add_argument("--split", help="from this split only; the others are empty in the new store")
    parser.add_argument("--rows", metavar="LIST", help="row numbers such as 0:100,250 (the end is not in)")
    parser.add_argument("--documents", metavar="LIST", help="document numbers, likewise")
    parser.add_argument(
        "--fraction", type=float, help="expected share of the rows, by a hash of their tokens"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of the fraction (0)")
    _jobs(parser, "look at rows and write shards")


def _subset(flags: argparse.Namespace, _: list[str]) -> int:
    from sparsekd.logit_store.tools.combine import subset_store

    with ProgressLine("store subset") as progress:
        digest = subset_store(
            store_path(flags.source),
            store_path(flags.target),
            split=flags.split,
            rows=_numbers(flags.rows, "--rows"),
            documents=_numbers(flags.documents, "--documents"),
            fraction=flags.fraction,
            seed=flags.seed,
            jobs=flags.jobs,
            progress=progress,
        )
    return _made(store_path(flags.target), digest)


def _reencode_arguments(parser: argparse.ArgumentParser) -> None:
    _source_and_target(parser)
    parser.add_argument("--codec", help="of the new store (the old one's)")
    parser.add_argument("--mass", type=float, help="of compact: heads end where their probabilities reach it")
    parser.add_argument(
        "--k", type=_at_least(0), help="head entries to keep; the others join the rest exactly"
    )
    parser.add_argument("--drop-draws", action="store_true", help="leave the sampled tail away")
    _jobs(parser, "write shards")


def _reencode(flags: argparse.Namespace, _: list[str]) -> int:
    from sparsekd.logit_store.tools.reencode import reencode_store

    if flags.codec is None and flags.mass is None and flags.k is None and not flags.drop_draws:
        raise ConfigError("store reencode changes nothing so: give --codec, --mass, --k or --drop-draws.")
    with ProgressLine("store reencode") as progress:
        digest = reencode_store(
            store_path(flags.source),
            store_path(flags.target),
            codec=flags.codec,
            mass=flags.mass,
            k=flags.k,
            drop_draws=flags.drop_draws,
            jobs=flags.jobs,
            progress=progress,
        )
    print(f"digest {digest}")
    print(f"next: sparsekd store compare {flags.source} {flags.target}")
    return 0


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    from sparsekd.trainer.importers.formats import FORMATS

    defaults = StoreConfig()
    parser.add_argument("source", help="the file or folder that holds it")
    parser.add_argument("target", metavar="new", help="the new store")
    parser.add_argument("--format", choices=FORMATS, help="who wrote it (found by its files)")
    parser.add_argument("--tokenizer", help="folder or hub name of the tokenizer that made the ids")
    parser.add_argument("--tokens", help="megatron: a token store whose rows are its samples, in order")
    parser.add_argument("--split", help="megatron: of the token store (train)")
    parser.add_argument("--compression", help="distillkit: its compression_config.yaml (beside the data)")
    parser.add_argument(
        "--alignment", choices=("current", "legacy"), help="axolotl: its kd_prepared_targets_alignment"
    )
    parser.add_argument("--teacher-name", default="unknown", help="the teacher's name, for the manifest")
    parser.add_argument("--teacher-revision", help="the teacher's revision, for the manifest")
    parser.add_argument("--sequence-length", type=_at_least(2), help="tokens of a row (the longest document)")
    parser.add_argument(
        "--k", type=_at_least(1), help="head entries, or draws (as many as every position lists)"
    )
    parser.add_argument(
        "--short", choices=SHORT, default="refuse", help="positions that list fewer than k ids (refuse)"
    )
    parser.add_argument("--codec", default=defaults.codec, help=f"of the new store ({defaults.codec})")
    parser.add_argument(
        "--rows-per-shard",
        type=_at_least(1),
        default=defaults.rows_per_shard,
        help=f"of the new store ({defaults.rows_per_shard}); a shard is held in memory",
    )


def _import_details() -> str:
    from sparsekd.trainer.importers.formats import formats_text

    return formats_text()


def _import(flags: argparse.Namespace, _: list[str]) -> int:
    from sparsekd.trainer.door.store_import import run as run_import

    with ProgressLine("store import") as progress:
        result = run_import(flags, progress)
    print(result.text())
    print(f"next: sparsekd store verify {flags.target}")
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a store")
    parser.add_argument("target", metavar="new", help="a folder for the Parquet files")
    parser.add_argument("--split", help="this split only")
    parser.add_argument("--text", action="store_true", help="add each token's text")
    _jobs(parser, "write files")


def _export(flags: argparse.Namespace, _: list[str]) -> int:
    from sparsekd.logit_store.places.files import size_of
    from sparsekd.logit_store.tools.export import export_store

    with ProgressLine("store export") as progress:
        files = export_store(
            store_path(flags.source),
            store_path(flags.target),
            split=flags.split,
            text=flags.text,
            jobs=flags.jobs,
            progress=progress,
        )
    size = sum(size_of(file) for file in files)
    print(f"wrote {len(files):,} files, {size:,} bytes, one line per position")
    print(f"next: python -c \"import pandas; print(pandas.read_parquet('{files[0]}'))\"")
    return 0


ACTIONS = {
    "inspect": Action(
        "a page about a store: what it is, how much, a few positions", _inspect_arguments, _inspect
    ),
    "verify": Action(
        "every checksum, every row's rules, and whether records fit their tokens",
        _verify_arguments,
        _verify,
        settings=("store.seed", "store.tokens", "teacher", "launch", "engine.timeout_minutes"),
    ),
    "stats": Action(
        "tail mass, entropy, teacher's loss, overlap and bytes, as text and plot", _stats_arguments, _stats
    ),
    "compare": Action(
        "how far the records of two stores over one text are apart", _compare_arguments, _compare
    ),
    "merge": Action("the rows of several stores in a new one", _merge_arguments, _merge),
    "subset": Action(
        "some rows, documents or a fraction of a store in a new one", _subset_arguments, _subset
    ),
    "reencode": Action(
        "another codec or a smaller head, without the teacher", _reencode_arguments, _reencode
    ),
    "import": Action(
        "what DistillKit, Megatron-LM, NeMo-Aligner, vLLM, axolotl or an API gave",
        _import_arguments,
        _import,
        details=_import_details,
    ),
    "export": Action("plain Parquet for pandas, polars and DuckDB", _export_arguments, _export),
}


def _source_and_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a store")
    parser.add_argument("target", metavar="new", help="the new store")


def _jobs(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--jobs", type=_at_least(1), default=1, help=f"processes that {what} (1)")


def _at_least(lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is below {lowest}")
        return value

    return parse


def _numbers(text: str | None, flag: str) -> list[range] | None:
    """Returns the numbers of a list such as 0:100,250 as ranges; None for None."""
    if text is None:
        return None
    numbers: list[range] = []
    for part in text.split(","):
        first, colon, last = part.strip().partition(":")
        try:
            start = int(first)
            numbers.append(range(start, int(last) if colon else start + 1))
        except ValueError:
            raise ConfigError(
                f"{flag} {text!r} is no list of numbers and ranges such as 0:100,250."
            ) from None
    if not any(part.start < part.stop for part in numbers):
        raise ConfigError(f"{flag} {text!r} names no number.")
    return numbers


def _made(path: StorePath, digest: str) -> int:
    print(f"digest {digest}")
    print(f"next: sparsekd store inspect {path}   then: {_next_of_store(str(path))}")
    return 0


def _next_of_store(path: str) -> str:
    """What one does with a sound store: run a teacher over its tokens, or train from its records."""
    manifest = read_manifest(store_path(path))
    if manifest.teacher is None:
        return f"sparsekd capture teacher.path=TEACHER store.tokens={path} store.path=STORE"
    mode = " objective.target_mode=renormalized" if manifest.record.rest == "unknown" else ""
    return f"sparsekd train store.path={path} student.path=STUDENT{mode}"
