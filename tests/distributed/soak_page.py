"""The page of all soaks, `benchmarks/results/soak.md`: a row for each commit and day, and their sum.

    PYTHONPATH=tests:tests/distributed:benchmarks python tests/distributed/soak_page.py \\
        --lines .soak/starts.jsonl --commit COMMIT

makes the rows of all lines again, and keeps those of other commits and days that the page has. So it adds up
over sittings, machines' folders and years, and making it twice changes nothing.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from page import RESULTS, processor, table, versions
from soak_counts import GOODPUT_PARTS, VERBS, counted
from soak_jobs import lines_of

PAGE = RESULTS / "soak.md"
GIBIBYTE = 1 << 30
HEAD = (
    *("commit", "day", "kills", "gentle signals", "starts", "training runs", "capture runs", "wrong runs"),
    *("hours", "ranks", "blows fell in"),
)
WRONG_HEAD = ("commit", "time", "run", "what was wrong")
GOODPUT_HEAD = ("commit", "time", "minutes", "kills", "steps", *GOODPUT_PARTS)

Key = tuple[str, str]
"""Commit, and day or time."""


@dataclass
class Row:
    """What one commit came to on one day; see `Totals`."""

    kills: int = 0
    signals: int = 0
    starts: int = 0
    runs: tuple[int, ...] = (0,) * len(VERBS)
    wrong: int = 0
    hundredths: int = 0
    """Of an hour; whole, so that a sum is that of what is read."""
    worlds: frozenset[int] = frozenset()
    phases: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Row") -> "Row":
        return Row(
            self.kills + other.kills,
            self.signals + other.signals,
            self.starts + other.starts,
            tuple(one + more for one, more in zip(self.runs, other.runs, strict=True)),
            self.wrong + other.wrong,
            self.hundredths + other.hundredths,
            self.worlds | other.worlds,
            self.phases + other.phases,
        )

    def cells(self) -> list[str]:
        """As on the page."""
        numbers = (self.kills, self.signals, self.starts, *self.runs, self.wrong)
        # The most frequent first; of equal ones by name, so that a page made again is the same.
        phases = sorted(self.phases.items(), key=lambda entry: (-entry[1], entry[0]))
        return [
            *(f"{number:,}" for number in numbers),
            f"{self.hundredths / 100:.2f}",
            " ".join(map(str, sorted(self.worlds))),
            "; ".join(f"{phase} {count}" for phase, count in phases),
        ]


def row_of(cells: Sequence[str]) -> Row:
    """What `Row.cells` wrote."""
    kills, signals, starts, *runs, wrong = (int(cell.replace(",", "")) for cell in cells[:-3])
    phases = (entry.rpartition(" ") for entry in cells[-1].split("; ") if entry)
    return Row(
        kills,
        signals,
        starts,
        tuple(runs),
        wrong,
        round(float(cells[-3]) * 100),
        frozenset(map(int, cells[-2].split())),
        Counter({phase: int(count) for phase, _, count in phases}),
    )


def rows_of(lines: Iterable[dict[str, Any]], commit: str) -> dict[Key, Row]:
    """The rows of some lines.

    Args:
        lines: Of files of results.
        commit: Of lines that bear none.
    """
    groups: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["kind"] != "goodput":
            groups[line.get("commit", commit), line["time"][:10]].append(line)
    rows = {}
    for key, group in groups.items():
        totals = counted(group)
        rows[key] = Row(
            totals.kills,
            totals.signals,
            totals.starts,
            tuple(totals.runs[verb] for verb in VERBS),
            totals.wrong,
            round(totals.seconds / 36),
            frozenset(totals.worlds),
            totals.phases,
        )
    return rows


def wrong_rows_of(lines: Iterable[dict[str, Any]], commit: str) -> dict[Key, list[str]]:
    """The cells of each wrong run, without commit and time.

    Args:
        lines: Of files of results.
        commit: Of lines that bear none.
    """
    return {
        (line.get("commit", commit), line["time"]): [
            f"{line.get('verb', VERBS[0])} {line['run']}",
            "; ".join(line["problems"]).replace("|", "/"),
        ]
        for line in lines
        if line["kind"] == "run" and line["problems"]
    }


def goodput_rows_of(lines: Iterable[dict[str, Any]]) -> dict[Key, list[str]]:
    """The cells of each measured share of useful time, without commit and time."""
    return {
        (line["commit"], line["time"][:16]): [
            f"{line['seconds'] / 60:.1f}",
            str(line["kills"]),
            f"{line['steps']:,}",
            *(f"{line['shares'][part]:.1%}" for part in GOODPUT_PARTS),
        ]
        for line in lines
        if line["kind"] == "goodput"
    }


def cells_on(page: str, head: Sequence[str]) -> dict[Key, list[str]]:
    """The cells of the rows below a head, without commit and day; the total is no commit's."""
    found: dict[Key, list[str]] = {}
    lines = iter(page.splitlines())
    for line in lines:
        if line == _line(head):
            next(lines)
            for row in lines:
                if not row.startswith("|"):
                    break
                first, second, *cells = (cell.strip() for cell in row.strip("|").split("|"))
                if match := re.fullmatch(r"`(.+)`", first):
                    found[match[1], second] = cells
    return found


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def updated(page: str, lines: Sequence[dict[str, Any]], commit: str) -> str:
    """A page with the rows of some lines.

    Args:
        page: As it was; empty for none.
        lines: Of files of results, all that there are of their commits and days.
        commit: Of lines that bear none.

    Raises:
        SystemExit: The page counts more starts of a commit and day than the lines do.
    """
    rows = {key: row_of(cells) for key, cells in cells_on(page, HEAD).items()}
    for key, row in rows_of(lines, commit).items():
        if key in rows and rows[key].starts > row.starts:
            raise SystemExit(
                f"The page counts {rows[key].starts:,} starts of commit {key[0]} on {key[1]}, the lines "
                f"{row.starts:,}: give all files of that day's lines by --lines, or nothing is written."
            )
        rows[key] = row
    wrong = cells_on(page, WRONG_HEAD) | wrong_rows_of(lines, commit)
    goodput = cells_on(page, GOODPUT_HEAD) | goodput_rows_of(lines)
    total = sum(rows.values(), Row())
    newest = max(lines, key=lambda line: str(line["time"]), default={}).get("commit", commit)
    memory = round(_memory_bytes() / GIBIBYTE)
    return "\n".join(
        [
            "# Runs that were killed and stopped at random",
            "",
            f"Written by `make soak` or `make goodput` on {date.today().isoformat()}, code of commit "
            f"`{newest}` (a + where files differed from it): {processor()}, {memory} GiB of memory; "
            f"{versions(('torch', 'deepspeed', 'transformers', 'numpy'))}. Rows of other commits and days "
            "are kept as they were written then.",
            "",
            "**One machine was shared**, by all ranks of a run and by other work: hours, and the moments at "
            "which blows fell, are those of a busy machine; how runs ended does not depend on it.",
            "",
            "## Counts",
            "",
            *_of_counts(),
            "",
            *table(
                HEAD,
                [
                    *(
                        [f"`{key[0]}`", key[1], *row.cells()]
                        for key, row in sorted(rows.items(), key=_by_day)
                    ),
                    ["**all**", "", *total.cells()],
                ],
                words=(0, 1, len(HEAD) - 2, len(HEAD) - 1),
            ),
            *(_of_wrong(wrong) if wrong else []),
            *(_of_goodput(goodput) if goodput else []),
        ]
    )


def _of_counts() -> list[str]:
    return [
        "kills: SIGKILL, to all ranks at once or to one. gentle signals: SIGTERM, SIGINT or SIGUSR2. Those "
        "that found no rank alive, or the work done, do not count. wrong runs: whose end differs from that "
        "of the run that nobody disturbed (of a training the weights, equal in every bit with one number of "
        "ranks and else within 1e-5, the lines of metrics and the rows consumed; of a capture every byte of "
        "the store), or one of whose starts ended otherwise than it should (exit codes, who is blamed, a "
        "step or unit lost by a stop). A wrong run stays on the page when its cause is mended. hours: of all "
        "starts. blows fell in: phases of the ranks at that moment; a blow counts once for each phase that "
        "any was in.",
    ]


def _of_wrong(rows: dict[Key, list[str]]) -> list[str]:
    return [
        "## Wrong runs",
        "",
        "As they were judged then, by whatever was at fault: the run, or its judge.",
        "",
        *table(
            WRONG_HEAD,
            ([f"`{key[0]}`", key[1], *cells] for key, cells in sorted(rows.items(), key=_by_day)),
            words=range(len(WRONG_HEAD)),
        ),
    ]


def _of_goodput(rows: dict[Key, list[str]]) -> list[str]:
    return [
        "## Useful time under kills",
        "",
        "A training on 2 ranks, all of them killed every 20 s until the minutes that were asked for are "
        "over, with a checkpoint about every 2 s, to its last step. useful: all steps at the median time of "
        "one. slower steps: what they took beyond it, with their lines of metrics. start-up: from a start to "
        "its first step (libraries are loaded before). lost steps: those beyond the newest checkpoint.",
        "",
        *table(
            GOODPUT_HEAD,
            ([f"`{key[0]}`", key[1], *cells] for key, cells in sorted(rows.items(), key=_by_day)),
            words=(0, 1),
        ),
    ]


def _by_day(entry: tuple[Key, Any]) -> tuple[str, str]:
    (commit, day), _ = entry
    return day, commit


def _memory_bytes() -> int:
    text = Path("/proc/meminfo").read_text()
    match = re.search(r"MemTotal:\s+(\d+) kB", text)
    return int(match[1]) * 1024 if match else 0


def update(page: Path, results: Sequence[Path], commit: str) -> None:
    """Makes the rows of files of results, on a page that may be there.

    Args:
        page: The file.
        results: Files of JSON lines.
        commit: Of lines that bear none.

    Raises:
        SystemExit: The page counts more than the lines.
    """
    lines = [line for place in results for line in lines_of(place)]
    before = page.read_text() if page.exists() else ""
    page.write_text(updated(before, lines, commit))
    print(f"written: {page}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=Path, nargs="+", default=[Path(".soak/starts.jsonl")])
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--commit", default="unknown", help="of lines that bear none")
    asked = parser.parse_args()
    update(asked.page, asked.lines, asked.commit)


if __name__ == "__main__":
    main()
