"""Our reading of node lists is Slurm's."""

import random
import subprocess

import pytest
from slurm_cluster import Cluster

from sparsekd.launch.env import parsed_hosts

pytestmark = pytest.mark.slurm

LISTS = 150


@pytest.mark.ci
def test_node_lists_are_read_as_slurm_reads_them(cluster: Cluster) -> None:
    chance = random.Random(11)

    def numbers() -> str:
        first, width = chance.randrange(0, 120), chance.choice((1, 2, 3))
        last = first + chance.randrange(0, 12)
        return chance.choice((f"{first:0{width}}", f"{first:0{width}}-{last:0{width}}"))

    def name() -> str:
        parts = [chance.choice(("n", "gpu-", "r0c"))]
        for _ in range(chance.randrange(0, 3)):
            parts.append(chance.choice(("", "x", "-ib")))
            parts.append(f"[{','.join(numbers() for _ in range(chance.randrange(1, 4)))}]")
        return "".join(parts)

    for _ in range(LISTS):
        listed = ",".join(name() for _ in range(chance.randrange(1, 4)))
        done = subprocess.run(
            ["scontrol", "show", "hostnames", listed], env=cluster.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert parsed_hosts(listed) == done.stdout.split(), listed
