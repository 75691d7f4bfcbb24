"""The mapping from Slurm's variables to torch's."""

import pytest

from sparsekd.launch.env import FIRST_PORT, PORT_SPAN, first_host, torch_variables

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_NODELIST": "gpu[001-004]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("gpu[003-010,012],login1", "gpu003"),
        ("node7", "node7"),
        ("a-b.c[1,5-9]-ib,z", "a-b.c1-ib"),
        ("n1,n2", "n1"),
        ("rack2n[08]", "rack2n08"),
    ],
)
def test_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_an_empty_node_list_is_refused() -> None:
    with pytest.raises(ValueError, match="host name"):
        first_host("")


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
    assert FIRST_PORT <= port < FIRST_PORT + PORT_SPAN
    assert torch_variables({**SRUN, "SLURM_PROCID": "0"})["MASTER_PORT"] == str(port)
    assert torch_variables({**SRUN, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != str(port)


def test_torchrun_wins_over_srun_and_a_given_address_over_the_derived_one() -> None:
    assert torch_variables({**SRUN, "RANK": "0", "WORLD_SIZE": "2"}) == {}
    given = torch_variables({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "999"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "999")


def test_one_process_without_a_launcher_also_inside_an_allocation() -> None:
    assert torch_variables({})["WORLD_SIZE"] == "1"
    batch_step = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert torch_variables(batch_step)["WORLD_SIZE"] == "1"


def test_contradicting_variables_are_refused() -> None:
    with pytest.raises(ValueError, match="SLURM_PROCID=16"):
        torch_variables({**SRUN, "SLURM_PROCID": "16"})
