"""A run folder has one owner: who lives is named, who is dead is followed, and who lost it writes no more."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sparsekd.trainer.run import lease, owner
from sparsekd.trainer.run.errors import OwnerError, UserError
from sparsekd.trainer.run.lease import STALE_SECONDS
from sparsekd.trainer.run.owner import OWNER_NAME, Claim, owned
from sparsekd.trainer.run.process import life_of, this_process
from sparsekd.trainer.run.ranks import Ranks

FIRST = Ranks(0, 0, 2, torch.device("cpu"))
SECOND = Ranks(1, 1, 2, torch.device("cpu"))


@pytest.fixture(autouse=True)
def settles_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "_SECONDS_TO_SETTLE", 0.01)


def claimed(folder: Path, **environment: str) -> None:
    with owned(folder, environment, FIRST) as claim:
        claim.require()


def change(folder: Path, **process: object) -> None:
    """Changes who the owner's file names."""
    place = folder / OWNER_NAME
    content = json.loads(place.read_text())
    content["process"] |= process
    place.write_text(json.dumps(content))


def silent_for(folder: Path, seconds: float) -> None:
    now = time.time()
    os.utime(folder / OWNER_NAME, (now - seconds, now - seconds))


def test_a_second_start_is_refused_and_told_whom_it_met(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "kd"
    with owned(folder, {"SLURM_JOB_ID": "71", "SLURM_RESTART_COUNT": "2"}, FIRST, "ours") as claim:
        said = rf"{folder} belongs to process {os.getpid()} on .* \(Slurm job 71, start 2\), whose last sign"
        with pytest.raises(OwnerError, match=said):
            claimed(folder)
        with pytest.raises(OwnerError, match=said):
            claimed(folder, SLURM_JOB_ID="71", SLURM_RESTART_COUNT="2")
        claim.require()
        # The other ranks of a job know whose it is, and own nothing.
        with owned(folder, {}, SECOND, "ours") as of_second, owned(folder, {}, SECOND, "late") as of_late:
            of_second.require()
            assert not of_second.is_anothers() and of_late.is_anothers()
        assert [path.name for path in folder.iterdir()] == [OWNER_NAME]
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    claimed(folder)


def test_a_folder_in_which_nothing_came_to_be_goes_again(tmp_path: Path) -> None:
    claimed(tmp_path / "runs" / "of" / "mine")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    claimed(tmp_path / "runs" / "of" / "mine")
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"] and not list((tmp_path / "runs").iterdir())


def left_by(folder: Path, code: str = "") -> "subprocess.Popen[str]":
    """Another process that owns the folder, and waits; it is in the state that `code` brings it to."""
    folder.mkdir(parents=True, exist_ok=True)
    program = f"""
import os, sys, time, torch
from pathlib import Path
from sparsekd.trainer.run.owner import owned
from sparsekd.trainer.run.ranks import Ranks
with owned(Path({str(folder)!r}), {{}}, Ranks(0, 0, 1, torch.device("cpu"))) as claim:
    {code or "pass"}
    print("owned", flush=True)
    sys.stdin.read()
    claim.require()
"""
    job = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None and job.stdout.readline() == "owned\n"
    return job


def test_a_killed_owner_is_followed_at_once(tmp_path: Path) -> None:
    job = left_by(tmp_path)
    with pytest.raises(OwnerError, match=f"belongs to process {job.pid} on "):
        claimed(tmp_path)
    job.kill()
    # Not yet waited for by its parent, it is dead all the same.
    while life_of(lease.read(tmp_path / OWNER_NAME).holder.process) != "dead":  # type: ignore[union-attr]
        time.sleep(0.01)
    claimed(tmp_path)
    job.wait()
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    with owned(tmp_path, {}, FIRST):
        change(tmp_path, started=this_process().started - 1)
        with owned(tmp_path, {}, FIRST) as claim:
            claim.require()


def test_an_owner_on_another_machine_is_given_ten_beats(tmp_path: Path) -> None:
    with owned(tmp_path, {}, FIRST) as first:
        change(tmp_path, machine="another boot", host="far")
        silent_for(tmp_path, STALE_SECONDS - 20)
        with pytest.raises(OwnerError, match=r"on far, whose last sign of life is 1[23]\d s old"):
            claimed(tmp_path)
        silent_for(tmp_path, STALE_SECONDS + 20)
        with owned(tmp_path, {}, FIRST) as second:
            second.require()
            # The first one was only asleep: it writes no more, and takes nothing with it.
            with pytest.raises(OwnerError, match=f"taken over by process {os.getpid()} .* leaves without"):
                first.require()
    assert list(tmp_path.iterdir()) == []


def test_the_age_of_an_owner_is_by_the_clock_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's clock may be hours away from it."""
    with owned(tmp_path, {}, FIRST):
        change(tmp_path, machine="another boot")
        monkeypatch.setattr(time, "time", lambda: 4e9)
        with pytest.raises(OwnerError, match=r"last sign of life is \d s old"):
            claimed(tmp_path)


def test_a_later_start_of_the_same_slurm_job_follows_at_once(tmp_path: Path) -> None:
    with owned(tmp_path, {"SLURM_JOB_ID": "71"}, FIRST):
        change(tmp_path, machine="another boot")
        for other in ({"SLURM_JOB_ID": "72", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "71"}):
            with pytest.raises(OwnerError):
                claimed(tmp_path, **other)
        claimed(tmp_path, SLURM_JOB_ID="71", SLURM_RESTART_COUNT="1")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"process": 1}', b"x" * 9999])
def test_an_owner_that_cannot_be_read_lives_until_its_time_is_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / OWNER_NAME).write_bytes(content)
    with pytest.raises(OwnerError, match="a job that cannot be read from it"):
        claimed(tmp_path)
    silent_for(tmp_path, STALE_SECONDS + 20)
    claimed(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_living_file_that_was_taken_by_mistake_is_put_back(tmp_path: Path) -> None:
    """Judged dead, it was touched before it could be renamed: or another start had just made it."""
    with owned(tmp_path, {}, FIRST) as claim:
        place = tmp_path / OWNER_NAME
        judged = lease.read(place)
        assert judged is not None
        silent_for(tmp_path, 1)
        lease._put_away(place, judged)
        claim.require()
        assert [path.name for path in tmp_path.iterdir()] == [OWNER_NAME]


def test_of_many_that_start_at_once_one_owns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "_SECONDS_TO_SETTLE", 1.0)
    (tmp_path / OWNER_NAME).write_text("{}")
    silent_for(tmp_path, STALE_SECONDS + 20)  # all of them may take it over
    owners, refused = [], []
    begin, done = threading.Barrier(8), threading.Barrier(8)

    def start() -> None:
        begin.wait()
        try:
            with owned(tmp_path, {}, FIRST) as claim:
                owners.append(claim)
                done.wait()
        except OwnerError as error:
            refused.append(error)
            done.wait()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refused)) == (1, 7)


def test_the_owner_keeps_its_file_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.02)
    with owned(tmp_path, {}, FIRST):
        silent_for(tmp_path, 1000)
        deadline = time.monotonic() + 20
        while (tmp_path / OWNER_NAME).stat().st_mtime < time.time() - 500 and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(OwnerError, match="last sign of life is 0 s old"):
            claimed(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_or_file_that_was_removed_ends_the_owner(tmp_path: Path, whole: bool) -> None:
    folder = tmp_path / "run"
    with owned(folder, {}, FIRST) as claim:
        (folder / OWNER_NAME).unlink()
        if whole:
            folder.rmdir()
        with pytest.raises(OwnerError, match=rf"{folder / OWNER_NAME if not whole else folder} is not there"):
            claim.require()


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        claimed(tmp_path / "file" / "run")


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_is_no_file_is_named_and_left_alone(tmp_path: Path, kind: str) -> None:
    """At a FIFO one would wait for ever; a link to nothing is neither there nor can it be created."""
    place = tmp_path / OWNER_NAME
    {"fifo": os.mkfifo, "folder": Path.mkdir, "link": lambda path: path.symlink_to("nothing")}[kind](place)
    with pytest.raises(UserError, match=f"{OWNER_NAME} (is no file|cannot be read)"):
        claimed(tmp_path)
    assert list(tmp_path.iterdir()) == [place]
    assert not Claim(place, "ours").is_anothers()


def test_an_owners_file_that_could_not_be_written_goes_again(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))  # as on a disk that is full at this byte
    try:
        with pytest.raises(UserError, match="cannot be written"):
            claimed(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


KILLED_AT_EACH_LINE = """
import os, signal, sys
from pathlib import Path
from sparsekd.trainer.run import lease
place, me = Path(sys.argv[1]), lease.Holder.of_this_process({})

def killed_at(last):
    def look(frame, event, argument):
        if frame.f_code.co_filename != lease.__file__:
            return None
        if event == "line":
            killed_at.lines += 1
            if killed_at.lines == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return look
    killed_at.lines = 0
    sys.settrace(look)
    lease.take(place, lease.Holder.of_this_process({}))
    sys.settrace(None)
    os._exit(0)

last, status = 1, 1
while status:
    if (child := os.fork()) == 0:
        killed_at(last)
    status = os.waitpid(child, 0)[1]
    lease.take(place, me).release()
    last += 1
print(last)
"""


@pytest.mark.parametrize("links", ["", "def _none(*_): raise OSError(95, 'none')\nos.link = _none"])
def test_one_that_is_killed_while_it_takes_a_lease_is_followed_at_once(tmp_path: Path, links: str) -> None:
    """At whatever line: a file that names nobody would hold all others up until it is old."""
    program = KILLED_AT_EACH_LINE.replace("place, me", f"{links}\nplace, me", 1)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "lease")], capture_output=True, text=True
    )
    if links:  # without hard links it may, and says so
        assert "HeldError" in done.stderr
    else:
        assert done.returncode == 0 and int(done.stdout) > 10, done.stderr
        assert not (tmp_path / "lease").exists()
