"""The cable between two hosts is cut in mid-step: both end, and say with whom they could not speak."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed_harness import Workplace, long_run, overrides_of
from two_hosts import ADDRESSES, TwoHosts, connect, disconnect, why_impossible

pytestmark = pytest.mark.distributed

IMPOSSIBLE = why_impossible()
SECONDS = 240


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    made = connect(tmp_path)
    try:
        yield made
    finally:
        disconnect(made)


@pytest.mark.skipif(IMPOSSIBLE is not None, reason=str(IMPOSSIBLE))
def test_a_cut_link_ends_both_hosts_with_a_sentence_about_the_other(
    hosts: TwoHosts, workplace: Workplace, tmp_path: Path
) -> None:
    values = long_run(workplace, "cut")
    values["train"]["steps"] = 100_000
    values["run"]["root"] = str(tmp_path / "runs")
    values["engine"]["timeout_minutes"] = 0.25
    jobs = {host: hosts.torchrun(host, ["train", *overrides_of(values)]) for host in ADDRESSES}
    folder = tmp_path / "runs" / "cut"
    deadline = time.monotonic() + SECONDS
    while not any((folder / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline, hosts.output("left")
        assert all(job.poll() is None for job in jobs.values()), hosts.output("left")
        time.sleep(0.05)
    hosts.cut()
    codes = {host: job.wait(SECONDS) for host, job in jobs.items()}
    assert all(codes.values()), codes
    failed = json.loads((folder / "FAILED.json").read_text())
    assert failed["error"] == "RankLostError"
    assert "cannot speak with the others any more" in failed["message"]
    assert "look at the network between left, right" in failed["message"]
