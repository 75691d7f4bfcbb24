"""Work with files may take longer than a collective may; who dies meanwhile is named."""

import signal
import time
from pathlib import Path

import psutil
import pytest
from distributed_harness import Workplace
from jobs import ended, start, the_sentence

pytestmark = pytest.mark.distributed

SLOW = Path(__file__).with_name("slow_files.py")


@pytest.mark.timeout(400)
def test_slow_files_are_waited_for_beyond_the_time_out(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its student's weights, a checkpoint's checksums, its conversion, and a save."""
    train = {"steps": 3, "checkpoint_every": 2}
    values = workplace.run_values(
        "slow", student={"path": str(workplace.root / "pretrained"), "config": {}}, train=train
    )
    first = workplace.run_values("slow", student=values["student"], train=train | {"steps": 2})
    for run in (values, first):
        run["schedule"] = {"kind": "constant"}
    workplace.run([first], ranks=1)
    monkeypatch.setenv("SLOW_SECONDS", "17")
    monkeypatch.setenv("TIMEOUT_MINUTES", "0.25")
    output = workplace.run([values], ranks=2, worker=SLOW, timeout=300)
    slow = [line.removeprefix("slow: ") for line in output.splitlines() if line.startswith("slow: ")]
    assert slow == ["content_of", "crc32_of", "_start", "torch_save"]
    assert [line["step"] for line in workplace.metrics("slow")] == [1, 2, 3]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_while_the_first_reads_is_named(
    workplace: Workplace, tmp_path: Path, killed: int
) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_bytes((workplace.root / "pretrained" / "config.json").read_bytes())
    with (student / "model.safetensors").open("wb") as file:
        file.truncate(1 << 41)  # of zeros that take no room: it is read for half an hour
    jobs = start(workplace.root / "store", tmp_path, f"student.path={student}")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(
        place.path.endswith("model.safetensors") for place in psutil.Process(jobs[0].pid).open_files()
    ):
        assert all(job.poll() is None for job in jobs), ended(jobs)
        time.sleep(0.05)
    jobs[killed].kill()
    codes, output = ended(jobs)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 2, output[-6000:]
    said = the_sentence(output)
    assert f"Rank {killed} (process {jobs[killed].pid} on " in said and "died without a word" in said
    assert not (tmp_path / "run").exists()
