"""The loader benchmark's page and picture."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loader_contestants import (
    CHUNKED,
    CHUNKED_MANY,
    CHUNKED_MAPPED,
    DATASETS,
    DECODED,
    GLOBAL,
    GLOBAL_MANY,
    GLOBAL_MAPPED,
    MOSAICML,
)
from loader_data import Data
from page import table

HOW = (
    "Every loader gives the stored bytes of each row once an epoch (sparsekd's record batches, as they lie "
    "in its shards; in the peers' files one binary column with the same bytes), in an order drawn anew, and "
    "whoever takes them copies each into its place in a batch. sparsekd computes the crc32 of every row by "
    "itself. The peers compare nothing with anything; `+ crc32` has the taker compute it of what they give. "
    "`mapped` is store.access=mapped. `decoded` goes on to where the others stop: from bytes to the checked "
    "arrays that the loss reads in target mode `sampled`; what the peers' users would do there is theirs."
)

REQUESTS_MOST = {CHUNKED: 1 / 8, CHUNKED_MANY: 1 / 8, GLOBAL: 2.0, GLOBAL_MANY: 2.0}


@dataclass
class LocalResult:
    """One contestant on local files: rows per CPU second of each round."""

    name: str
    checked: bool
    rates: list[float] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name} + crc32" if self.checked else self.name

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("sparsekd")

    @property
    def rate(self) -> float:
        """Of the median round."""
        return statistics.median(self.rates)


@dataclass(frozen=True)
class RemoteResult:
    """One contestant on S3.

    Attributes:
        name: of it.
        requests: for a row, counted at the server.
        rate: rows per second of wall time.
        kept: bytes on the local disk afterwards.
    """

    name: str
    requests: float
    rate: float
    kept: int


Local = Sequence[tuple[Data, list[LocalResult]]]


def markdown(
    local: Local, remote: Sequence[RemoteResult], made: Sequence[str], settings: str, picture: str
) -> str:
    """The whole page."""
    lines = [
        "# Loading rows",
        "",
        *made,
        "",
        HOW,
        "",
        settings,
        "",
        f"![Rows per core]({picture})",
        "",
    ]
    lines += ["## Targets", "", *targets(local, remote)]
    for data, found in local:
        sizes = ", ".join(f"{name} {size:,}" for name, size in data.sizes.items())
        lines += [
            f"## Local files, rows of {data.shape.length:,} positions",
            "",
            f"{data.shape.rows:,} rows of {data.row_bytes:,.0f} bytes; bytes of the files: {sizes}.",
            "",
        ]
        rows = [
            [
                result.title,
                f"{result.rate:,.0f}",
                f"{min(result.rates):,.0f} to {max(result.rates):,.0f}",
                f"{result.rate * data.row_bytes / 1e9:.2f}",
            ]
            for result in sorted(found, key=lambda result: -result.rate)
        ]
        lines += table(("loader", "rows / CPU second", "rounds", "GB / CPU second"), rows, words=(0,))
    lines += ["## S3 on loopback, nothing read before", ""]
    asked = [
        [result.name, f"{result.requests:.4f}", f"{result.rate:,.1f}", f"{result.kept:,}"]
        for result in remote
    ]
    lines += table(
        ("loader", "requests / row", "rows / s", "bytes left on the local disk"), asked, words=(0,)
    )
    lines += [
        "mosaicml-streaming fetches whole shards, which it keeps on the local disk, ahead and in threads; "
        "sparsekd's rows stay in memory. Hugging Face datasets reads saved data sets from local files.",
        "",
    ]
    if not any(result.name == MOSAICML for result in remote):
        lines += ["mosaicml-streaming was not measured: give `--peers FOLDER`.", ""]
    return "\n".join(lines)


def targets(local: Local, remote: Sequence[RemoteResult]) -> list[str]:
    """What is wanted and what was found, in Markdown."""
    rows = []
    for data, found in local:
        ours = {result.name: result.rate for result in found if result.is_ours}
        for peer in (MOSAICML, DATASETS):
            for checked in (True, False):
                theirs = [r for r in found if r.name.startswith(peer) and r.checked == checked]
                if not theirs:
                    continue
                best = max(theirs, key=lambda result: result.rate)
                rows.append(_ratio_row(data.shape.length, ours, best, checked))
    for result in remote:
        if result.name in REQUESTS_MOST:
            most = REQUESTS_MOST[result.name]
            verdict = "yes" if result.requests <= most else "**no**"
            wanted = f"requests a row, {result.name}", f"<= {most:g}"
            rows.append([*wanted, f"{result.requests:.4f}", "", verdict])
    head = ("target", "wanted", "found", "with positional reads", "met")
    return table(head, rows, words=(0, 4))


def _ratio_row(length: int, ours: dict[str, float], best: LocalResult, checked: bool) -> list[str]:
    fastest = max(ours[CHUNKED_MAPPED], ours[GLOBAL_MAPPED], ours[CHUNKED], ours[GLOBAL])
    positional = max(ours[CHUNKED], ours[GLOBAL])
    words = "each row checked" if checked else "the peer unchecked"
    ratio = fastest / best.rate
    return [
        f"rows / core, {length} positions, sparsekd over {best.name}, {words}",
        "> 1",
        f"{ratio:.2f}",
        f"{positional / best.rate:.2f}",
        "yes" if ratio > 1 else "**no**",
    ]


def draw(local: Local, path: Path, note: str) -> None:
    """Writes the picture: rows per CPU second of each loader, a panel for each data set."""
    # Imported on use: the tables do without it.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(local), figsize=(6.4 * len(local), 4.8), squeeze=False)
    for axis, (data, found) in zip(axes[0], local, strict=True):
        shown = sorted((r for r in found if r.name != DECODED), key=lambda result: result.rate)
        colours = ["#D62728" if r.is_ours else "#56B4E9" if r.checked else "#0072B2" for r in shown]
        axis.barh(
            [result.title for result in shown], [result.rate for result in shown], color=colours, zorder=2
        )
        axis.grid(True, axis="x", color="#ececec", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_title(
            f"rows of {data.shape.length:,} positions, {data.row_bytes / 1000:,.0f} KB", fontsize=10
        )
        axis.set_xlabel("rows per CPU second; red and light blue: every row's crc32 computed", fontsize=9)
    figure.text(0.01, 0.01, note, fontsize=7, color="#666666")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
