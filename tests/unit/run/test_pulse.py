"""Who died, hangs or is behind is read from small files, and whatever stands in those does no harm."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sparsekd.trainer.run.process import Process, this_process
from sparsekd.trainer.run.pulse import Pulse

ME = this_process()
ELSEWHERE = replace(ME, host="n2", machine="another machine")


@pytest.fixture(scope="module")
def dead() -> Process:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return replace(ME, pid=child.pid)


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Pulse]:
    with Pulse(tmp_path, 0, [ME, ME]) as pulse:
        pulse.at(5, "step")
        yield pulse


def of(folder: Path, other: Process) -> Pulse:
    """The pulse of a first rank that stands in step 5, of two; the other left its file alone."""
    pulse = Pulse(folder, 0, [ME, other])
    pulse.at(5, "step")
    return pulse


HOSTILE = {
    "empty": b"",
    "half": b'{"step": 3, "pha',
    "no text": bytes(range(256)),
    "no object": b"[3]",
    "deep": b"[" * 5000,
    "keys": b'{"step": 3, "phase": "read", "more": 1}',
    "negative": b'{"step": -3, "phase": "read"}',
    "fraction": b'{"step": 3.5, "phase": "read"}',
    "truth": b'{"step": true, "phase": "read"}',
    "no number": b'{"step": NaN, "phase": "read"}',
    "phase": b'{"step": 3, "phase": ["read"]}',
    "long": b'{"step": 3, "phase": "' + b"x" * 100_000 + b'"}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_that_says_nothing_does_no_harm(tmp_path: Path, dead: Process, content: bytes) -> None:
    (tmp_path / "rank_1.pulse").write_bytes(content)
    with of(tmp_path, ME) as pulse:
        assert pulse.lost() == [] and pulse.last() == []
    with of(tmp_path, ELSEWHERE) as pulse:
        assert pulse.lost() == [] and pulse.last() == []
    # Who is dead is known without it.
    with of(tmp_path, dead) as pulse:
        (lost,) = pulse.lost()
        assert lost.rank == 1 and lost.stand is None
        assert str(lost).startswith(f"rank 1 (process {dead.pid} on {ME.host}) died without a word")


def test_no_file_and_a_folder_in_its_place_do_no_harm(tmp_path: Path, dead: Process) -> None:
    with of(tmp_path, dead) as pulse:
        assert len(pulse.lost()) == 1 and pulse.last() == []
        (tmp_path / "rank_1.pulse").mkdir()
        assert len(pulse.lost()) == 1 and pulse.last() == []


def test_only_the_head_of_a_huge_file_is_read(tmp_path: Path) -> None:
    with (tmp_path / "rank_1.pulse").open("wb") as file:
        file.write(b'{"step": 3, "phase": "read"}'.ljust(256))
        file.truncate(1 << 40)
    with of(tmp_path, ME) as pulse:
        assert [str(lost) for lost in pulse.last()] == [
            f"rank 1 ({ME}, last seen in step 3, read) is furthest behind"
        ]


def test_a_rank_that_left_or_failed_by_itself_is_not_lost(tmp_path: Path, dead: Process) -> None:
    for phase in ("left", "failed"):
        (tmp_path / "rank_1.pulse").write_text(f'{{"step": 3, "phase": "{phase}"}}')
        with of(tmp_path, dead) as pulse:
            assert pulse.lost() == [] and pulse.dead_here() == []
    (tmp_path / "rank_1.pulse").write_text('{"step": 3, "phase": "save"}')
    with of(tmp_path, dead) as pulse:
        assert [lost.rank for lost in pulse.dead_here()] == [1]
        assert "last seen in step 3, save" in str(pulse.lost()[0])


def test_a_rank_elsewhere_is_lost_when_its_beats_go_missing(tmp_path: Path) -> None:
    place = tmp_path / "rank_1.pulse"
    place.write_text('{"step": 3, "phase": "read"}')
    with of(tmp_path, ELSEWHERE) as pulse:
        assert pulse.lost() == []
        now = os.stat(tmp_path / "rank_0.pulse").st_mtime
        os.utime(place, (now - 100, now - 100))
        (lost,) = pulse.lost()
        assert "on n2, last seen in step 3, read) gives no sign of life since" in str(lost)
        assert pulse.dead_here() == []  # nobody here can know that


def test_whoever_is_furthest_behind_is_named_unless_all_stand_together(tmp_path: Path, first: Pulse) -> None:
    with Pulse(tmp_path, 1, [ME, ME]) as second:
        second.at(5, "read")
        assert first.last() == []
        second.at(4, "evaluate")
        assert [lost.rank for lost in first.last()] == [1]
        assert [lost.rank for lost in second.last()] == [1]
        assert first.lost() == second.lost() == []
    assert '"left"' in (tmp_path / "rank_1.pulse").read_text()
