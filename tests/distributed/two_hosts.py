"""Two hosts on one machine: network namespaces with names of their own and a cable between them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ADDRESSES = {"left": "10.213.7.1", "right": "10.213.7.2"}
PORT = 29_431  # nobody else listens in these namespaces

# Gloo asks for the address of its own host's name, so both names stand in a file that only these hosts see.
_ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


@dataclass(frozen=True)
class TwoHosts:
    """The hosts `left` and `right`; the names of their namespaces begin with `prefix`."""

    folder: Path
    prefix: str

    def start(self, host: str, words: Sequence[str]) -> "subprocess.Popen[str]":
        """Starts a program on a host; its output goes to HOST.txt."""
        plain = {name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment = plain | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
        enter = ["unshare", "--uts", "--mount", "sh", "-c", _ENTER, "sh", host, str(self.folder / "hosts")]
        with (self.folder / f"{host}.txt").open("w") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", f"{self.prefix}{host}", *enter, *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def torchrun(self, host: str, words: Sequence[str]) -> "subprocess.Popen[str]":
        """One rank of two of a verb, started by torchrun."""
        node = list(ADDRESSES).index(host)
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}"]
        place = [f"--master-addr={ADDRESSES['left']}", f"--master-port={PORT}"]
        door = ["-m", "sparsekd.trainer.door.cli"]
        return self.start(host, [sys.executable, *launcher, *place, *door, *words])

    def cut(self) -> None:
        """Takes the cable out: nothing arrives any more, and no connection is closed."""
        _ip("-n", f"{self.prefix}left", "link", "set", "cable", "down")

    def output(self, host: str) -> str:
        return (self.folder / f"{host}.txt").read_text()


def connect(folder: Path) -> TwoHosts:
    """Makes the namespaces and the cable; `disconnect` takes them away."""
    hosts = TwoHosts(folder, f"sparsekd{os.getpid()}")
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    left, right = (f"{hosts.prefix}{name}" for name in ADDRESSES)
    for name in (left, right):
        _ip("netns", "add", name)
    _ip(*("link", "add", "cable", "netns", left, "type", "veth", "peer", "name", "cable", "netns", right))
    for name, address in zip((left, right), ADDRESSES.values(), strict=True):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
        for device in ("lo", "cable"):
            _ip("-n", name, "link", "set", device, "up")
    return hosts


def disconnect(hosts: TwoHosts) -> None:
    """Ends what runs on the hosts and removes them."""
    for name in ADDRESSES:
        namespace = f"{hosts.prefix}{name}"
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        for number in listed.stdout.split():
            if psutil.pid_exists(int(number)):
                psutil.Process(int(number)).kill()
        subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def why_impossible() -> str | None:
    """Why this machine cannot have such hosts; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root alone"
    name = f"sparsekd{os.getpid()}try"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    except FileNotFoundError:
        return "ip is not installed: apt-get install iproute2"
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return None if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
