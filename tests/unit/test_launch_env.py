"""The mapping from Slurm's variables to torch's."""

import itertools
import random
import re
from pathlib import Path

import pytest

from sparsekd.launch.env import array_share, hosts, master_port, parsed_hosts, tasks_on_node, torch_variables

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_NODELIST": "gpu[001-004]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
FIRST_EPHEMERAL_PORT = 32_768  # Linux's net.ipv4.ip_local_port_range


@pytest.mark.parametrize(
    ("node_list", "names"),
    [
        ("node7", "node7"),
        ("n1,n2", "n1 n2"),
        ("gpu[003-005,012],login1", "gpu003 gpu004 gpu005 gpu012 login1"),
        ("a-b.c[1,5-6]-ib,z", "a-b.c1-ib a-b.c5-ib a-b.c6-ib z"),
        ("rack2n[08]", "rack2n08"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[098-101]", "n098 n099 n100 n101"),
        # The last bracket varies fastest, as `scontrol show hostnames` prints it.
        ("rack[1-2]node[3-4]", "rack1node3 rack1node4 rack2node3 rack2node4"),
        ("r[0-1]c[2]n[00,07]x", "r0c2n00x r0c2n07x r1c2n00x r1c2n07x"),
        (" n[1-2][3-4] ", "n13 n14 n23 n24"),
    ],
)
def test_the_hosts_of_a_node_list(node_list: str, names: str) -> None:
    assert parsed_hosts(node_list) == names.split()


@pytest.mark.parametrize(
    "node_list",
    [
        *("", " ", ",", "n1,", ",n1", "n1,,n2", "n[", "n[]", "n[1", "n]1", "n[2-1]", "n[1-]", "n[-1]"),
        *("n[1,]", "[1-2]", "n[1-2-3]", "n[a]", "n[[1]]", "n 1", "n;1", "n[1]é", "n[\N{SUPERSCRIPT TWO}]"),
        *("n[0-99999999999999999]", "n[0-9999][0-9999]", "n[0-999999],m[0-999999]", "n[" + "9" * 5000 + "]"),
    ],
)
def test_what_is_no_node_list_is_refused_in_one_sentence(node_list: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be read .*; set MASTER_ADDR to the host of rank 0") as said:
        parsed_hosts(node_list)
    assert len(str(said.value)) < 400


def test_node_lists_of_any_letters_give_hosts_or_the_sentence() -> None:
    chance = random.Random(5)
    for _ in range(3000):
        text = "".join(chance.choice("n1[2-3],r0") for _ in range(chance.randrange(1, 12)))
        try:
            found = parsed_hosts(text)
        except ValueError as error:
            assert "cannot be read" in str(error), text
        else:
            assert found and all(re.fullmatch(r"[a-z0-9-]+", name) for name in found), text


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo a7; echo a9", ["a7", "a9"]),
        ("echo a7; exit 1", ["n1", "n2"]),
        ("echo 'no: configuration'", ["n1", "n2"]),
        ("true", ["n1", "n2"]),
    ],
)
def test_slurm_itself_reads_a_node_list_where_it_can(
    script: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] || exit 3\n{script}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hosts("n[1-2]") == expected


def test_srun_variables_become_torch_s() -> None:
    variables = torch_variables(SRUN)
    port = int(variables.pop("MASTER_PORT"))
    assert variables == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu003",
    }
    assert torch_variables({**SRUN, "SLURM_PROCID": "0"})["MASTER_PORT"] == str(port)
    for change in ({"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "1235"}):
        assert torch_variables(SRUN | change)["MASTER_PORT"] != str(port)


def test_the_first_host_of_a_rack_is_the_address() -> None:
    racks = {**SRUN, "SLURM_STEP_NODELIST": "rack[1-2]node[3-4]"}
    assert torch_variables(racks)["MASTER_ADDR"] == "rack1node3"
    without_step = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    assert torch_variables(without_step)["MASTER_ADDR"] == "gpu001"


def test_ports_are_nobody_elses() -> None:
    """A requeued job that met its dying ranks, or a neighbour on the node, would hang or join them."""
    near = itertools.product(range(7_654_321, 7_654_330), range(64), range(32))
    ports = [master_port(job, step, restart) for job, step, restart in near]
    assert len(set(ports)) == len(ports)
    far = [master_port(job, 4_294_967_290, 1000) for job in range(0, 2**32, 12_345_677)]
    assert all(1024 < port < FIRST_EPHEMERAL_PORT for port in ports + far)


@pytest.mark.parametrize(
    ("listed", "by_node"),
    [("8", [8]), ("8,4", [8, 4]), ("8(x2),4", [8, 8, 4]), ("1,2(x3),1", [1, 2, 2, 2, 1])],
)
def test_each_node_has_its_own_number_of_tasks(listed: str, by_node: list[int]) -> None:
    assert [tasks_on_node(listed, node) for node in range(len(by_node))] == by_node
    nodes = len(by_node)
    with pytest.raises(ValueError, match=f"SLURM_NODEID={nodes} is not one of the {nodes} nodes"):
        tasks_on_node(listed, nodes)


def test_uneven_nodes_are_read_by_the_node_s_number() -> None:
    uneven = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_NTASKS": "12", "SLURM_NODEID": "1"}
    assert torch_variables(uneven)["LOCAL_WORLD_SIZE"] == "4"
    assert torch_variables({**uneven, "SLURM_NODEID": "0"})["LOCAL_WORLD_SIZE"] == "8"
    with pytest.raises(ValueError, match="SLURM_LOCALID=4 is not below the 4 tasks"):
        torch_variables({**uneven, "SLURM_LOCALID": "4"})


@pytest.mark.parametrize("listed", ["", "8,", "x2", "8(x0)", "0", "8(x2", "8 4", "8(x2)(x2)", "-1"])
def test_what_is_no_list_of_tasks_is_refused(listed: str) -> None:
    with pytest.raises(ValueError, match=r"SLURM_STEP_TASKS_PER_NODE=.* cannot be read"):
        tasks_on_node(listed, 0)


def test_torchrun_wins_over_srun_and_a_given_address_over_the_derived_one() -> None:
    assert torch_variables({**SRUN, "RANK": "0", "WORLD_SIZE": "2"}) == {}
    given = torch_variables(
        {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "999", "SLURM_STEP_NODELIST": "["}
    )
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "999")


def test_one_process_without_a_launcher_also_inside_an_allocation() -> None:
    assert torch_variables({})["WORLD_SIZE"] == "1"
    batch_step = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert torch_variables(batch_step)["WORLD_SIZE"] == "1"


def test_a_shell_in_a_step_of_many_tasks_waits_for_nobody() -> None:
    shell = {**SRUN, "SLURM_PTY_PORT": "41234"}
    with pytest.raises(
        ValueError, match=r"an interactive shell in a step of 16 tasks.*from salloc with srun"
    ):
        torch_variables(shell)
    alone = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    one = torch_variables({**shell, **alone, "SLURM_STEP_TASKS_PER_NODE": "1"})
    assert one["WORLD_SIZE"] == "1"
    # Variables that torchrun has set win, also in such a shell.
    assert torch_variables({**shell, "RANK": "0", "WORLD_SIZE": "4"}) == {}


def test_contradicting_variables_are_refused() -> None:
    with pytest.raises(ValueError, match="SLURM_PROCID=16"):
        torch_variables({**SRUN, "SLURM_PROCID": "16"})


@pytest.mark.parametrize("name", [name for name in SRUN if not name.endswith(("NODELIST", "PER_NODE"))])
@pytest.mark.parametrize("text", ["", "-1", "1.0", "one", "9" * 5000])
def test_a_variable_that_is_no_number_is_named(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* is not a number"):
        torch_variables({**SRUN, name: text})


def test_messages_are_short_whatever_they_quote() -> None:
    for name in SRUN.keys() - {"SLURM_JOB_NODELIST"}:
        with pytest.raises(ValueError) as said:
            torch_variables({**SRUN, name: "[" * 5000})
        assert len(str(said.value)) < 400 and ("node list" in str(said.value) or name in str(said.value))


def test_the_jobs_of_an_array_are_counted_from_zero() -> None:
    def share(listed: int, *, first: int = 0, step: int = 1, count: int = 4) -> tuple[int, int]:
        names = ("ID", "MIN", "STEP", "COUNT")
        numbers = zip(names, (listed, first, step, count), strict=True)
        return array_share({f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers})

    assert array_share({}) == (0, 1)
    assert [share(listed) for listed in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [share(listed, first=3, step=2, count=3)[0] for listed in (3, 5, 7)] == [0, 1, 2]
    assert all(share(listed, first=1, count=3)[0] < 3 for listed in (1, 5, 6))
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID='x' is not a number"):
        array_share({"SLURM_ARRAY_TASK_ID": "x"})
