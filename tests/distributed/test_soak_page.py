"""The soak's page adds up over sittings: each line counts once, under its commit and day."""

import random
from pathlib import Path
from typing import Any

import pytest
from soak_counts import GOODPUT_PARTS, counted
from soak_goodput import Watched, shares_of
from soak_page import HEAD, WRONG_HEAD, cells_on, row_of, rows_of, update, updated

DAYS = ("2026-11-30", "2026-12-01")


def lines(count: int, seed: int, *, commit: str | None, day: str) -> list[dict[str, Any]]:
    """Made-up starts and runs; without a commit they are from before lines bore one."""
    chance = random.Random(seed)
    found: list[dict[str, Any]] = []
    for number in range(count):
        mark: dict[str, Any] = {"time": f"{day} 12:00:00"}
        if commit is not None:
            mark |= {"commit": commit, "verb": chance.choice(("train", "capture"))}
        if chance.random() < 0.3:
            found.append(
                mark
                | {"kind": "run", "run": f"run-{number}", "problems": ["it hangs"] * (chance.random() < 0.1)}
            )
            continue
        world = chance.randint(1, 4)
        stands = [chance.choice((None, {"phase": "step"}, {"phase": "between units"})) for _ in range(world)]
        blow = {"signal": chance.choice(("SIGKILL", "SIGTERM", "SIGINT")), "fell": chance.random() < 0.7}
        start = {"kind": "start", "world": world, "seconds": chance.uniform(1, 900), "pulses": stands}
        found.append(mark | start | blow)
    return found


def test_it_adds_up_over_sittings() -> None:
    first = lines(300, 1, commit=None, day=DAYS[0])
    second = lines(200, 2, commit="beef", day=DAYS[0])
    third = lines(100, 3, commit="beef+", day=DAYS[1])
    page = updated("", first + second, "cafe")
    assert updated(page, first + second, "cafe") == page
    # Another folder's lines: what the page had of other commits stays.
    page = updated(page, third, "")
    found = {key: row_of(cells) for key, cells in cells_on(page, HEAD).items()}
    assert found.keys() == {("cafe", DAYS[0]), ("beef", DAYS[0]), ("beef+", DAYS[1])}
    for row, part in zip((found["cafe", DAYS[0]], found["beef", DAYS[0]]), (first, second), strict=True):
        kills = [line for line in part if line.get("fell") and line["signal"] == "SIGKILL"]
        gentle = [line for line in part if line.get("fell") and line["signal"] != "SIGKILL"]
        assert (row.kills, row.signals) == (len(kills), len(gentle))
        runs = [line for line in part if line["kind"] == "run"]
        assert row.starts == len(part) - len(runs) and sum(row.runs) == len(runs)
        assert row.wrong == sum(bool(line["problems"]) for line in runs)
        assert row.hundredths == round(sum(line.get("seconds", 0) for line in part) / 36)
    assert found["cafe", DAYS[0]].runs[1] == 0 and found["beef", DAYS[0]].runs[1] > 0
    total = next(line for line in page.splitlines() if line.startswith("| **all** |"))
    whole = row_of([cell.strip() for cell in total.strip("|").split("|")][2:])
    everything = counted(first + second + third)
    assert (whole.kills, whole.signals, whole.starts) == (
        everything.kills,
        everything.signals,
        everything.starts,
    )
    assert whole.wrong == everything.wrong and sum(whole.runs) == everything.runs.total()
    assert whole.hundredths == sum(row.hundredths for row in found.values())
    assert set(whole.worlds) == everything.worlds and whole.phases == everything.phases


def test_wrong_runs_stay_on_the_page_with_what_was_wrong() -> None:
    run = {"kind": "run", "time": "2026-11-30 12:00:01", "commit": "cafe", "verb": "capture", "run": "run-7"}
    page = updated("", [run | {"problems": ["it hangs", "a | b"]}], "")
    page = updated(page, [run | {"time": "2026-12-01 09:00:00", "commit": "beef", "problems": []}], "")
    assert cells_on(page, WRONG_HEAD) == {
        ("cafe", "2026-11-30 12:00:01"): ["capture run-7", "it hangs; a / b"]
    }


def test_more_lines_of_a_day_replace_its_row_and_fewer_are_refused(tmp_path: Path) -> None:
    sitting = lines(200, 4, commit="beef", day=DAYS[0])
    half = updated("", sitting[:100], "")
    page = updated(half, sitting, "")
    assert cells_on(page, HEAD)["beef", DAYS[0]] == rows_of(sitting, "")["beef", DAYS[0]].cells()
    place = tmp_path / "soak.md"
    place.write_text(page)
    (tmp_path / "lines.jsonl").write_text("")
    update(place, [tmp_path / "lines.jsonl"], "")
    assert cells_on(place.read_text(), HEAD) == cells_on(page, HEAD)
    with pytest.raises(SystemExit, match="the lines"):
        updated(page, sitting[:100], "")


def test_a_measured_share_of_useful_time_is_a_line_of_the_page() -> None:
    shares = dict.fromkeys(GOODPUT_PARTS, 0.125) | {"useful": 0.375}
    line = {"kind": "goodput", "time": f"{DAYS[0]} 12:00:07", "commit": "beef", "verb": "train"}
    line |= {"seconds": 660.0, "kills": 33, "steps": 4321, "step_seconds": 0.1, "shares": shares}
    page = updated("", [line, *lines(9, 5, commit="beef", day=DAYS[0])], "")
    row = f"| `beef` | {DAYS[0]} 12:00 | 11.0 | 33 | 4,321 | 37.5% |" + " 12.5% |" * 5
    assert page.count(row) == 1 and "| `beef` | 2026-11-30 | " in page
    again = updated(page, [line | {"time": f"{DAYS[1]} 01:00:00"}], "")
    assert row in again and again.count("| 37.5% |") == 2
    assert counted([line]).starts == 0


def test_the_parts_of_the_time_come_to_all_of_it() -> None:
    start = Watched(100.0)
    start.moments = [
        *((100.0, 0, "start"), (103.0, 1, "read"), (103.5, 1, "step"), (104.0, 1, "log"), (104.5, 1, "save")),
        *((105.0, 2, "read"), (106.0, 2, "step"), (108.0, 2, "failed")),
    ]
    start.ended = 110.0
    spent = start.seconds(kept=1)
    assert spent == {"start-up": 3.0, "kept steps": 1.5, "saving": 0.5, "lost steps": 3.0, "the rest": 2.0}
    shares = shares_of(spent, useful=1.0, wall=20.0)
    assert shares == {
        **{"useful": 0.05, "start-up": 0.15, "lost steps": 0.15, "saving": 0.025, "slower steps": 0.025},
        "the rest": pytest.approx(0.6),
    }
    assert sum(shares.values()) == pytest.approx(1.0)
