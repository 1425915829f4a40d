"""Every launcher's variables lead to the same rank table."""

from __future__ import annotations

import os

import pytest

from powertrain import environment
from powertrain.environment import Rank
from powertrain.errors import LaunchError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node03",
    "MASTER_PORT": "21234",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "MASTER_ADDR": "node03",
    "MASTER_PORT": "21234",
}
HYDRA = {
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "4",
    "MASTER_ADDR": "node03",
    "MASTER_PORT": "21234",
}
LAUNCHERS = {"torchrun": TORCHRUN, "srun": SRUN, "openmpi": OPEN_MPI, "hydra": HYDRA}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_each_launcher_gives_the_same_table(name: str) -> None:
    """torchrun, srun, Open MPI and hydra map to one and the same rank table."""
    rank = Rank.from_environment(LAUNCHERS[name])
    launcher = {"openmpi": "mpirun", "hydra": "mpirun"}.get(name, name)
    assert rank == Rank(
        index=5, world_size=8, local_index=1, local_size=4, address="node03", port=21234, launcher=launcher
    )


def test_plain_python_is_a_world_of_one() -> None:
    """Without any variable there is one rank, on this host."""
    rank = Rank.from_environment({"PATH": "/bin"})
    assert rank == Rank()
    assert (rank.index, rank.world_size, rank.local_index, rank.local_size) == (0, 1, 0, 1)
    assert rank.launcher == "python"


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument the variables of this process count."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert Rank.from_environment().index == 5


def test_a_batch_script_is_no_task() -> None:
    """Within sbatch, but not under srun, a process is a world of one."""
    assert Rank.from_environment({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Rank()


@pytest.mark.parametrize("inner", ["openmpi", "hydra"])
def test_mpirun_within_a_slurm_job_counts(inner: str) -> None:
    """Where mpirun's daemons are tasks of srun, the ranks are those of MPI."""
    daemon = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    assert Rank.from_environment({**daemon, **LAUNCHERS[inner]}).index == 5


def test_sruns_own_pmi_leaves_slurm_in_charge() -> None:
    """srun --mpi=pmi2 sets PMI_RANK as well, without local ranks: Slurm's variables win."""
    rank = Rank.from_environment({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"})
    assert (rank.launcher, rank.local_index, rank.local_size) == ("srun", 1, 4)


def test_torchrun_within_srun_counts() -> None:
    """Under torchrun within srun, torchrun's ranks count."""
    assert Rank.from_environment({**SRUN, **TORCHRUN, "RANK": "2"}).index == 2


@pytest.mark.parametrize(
    ("counts", "node", "size"),
    [("2(x3),1", 0, 2), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("1,3", 1, 3), ("4", 0, 4)],
)
def test_slurms_counts_are_expanded(counts: str, node: int, size: int) -> None:
    """``2(x3),1`` means three nodes of two tasks and one of one."""
    env = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
    assert Rank.from_environment(env).local_size == size


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[03-07,12],other", "node03"),
        ("node7", "node7"),
        ("a,b", "a"),
        ("a,node[1-2]", "a"),
        ("n[001,005-006]-ib", "n001-ib"),
    ],
)
def test_the_first_host_of_a_nodelist(nodes: str, first: str) -> None:
    """Ranks meet at the first host of Slurm's compressed list."""
    assert Rank.from_environment({**SRUN, "SLURM_STEP_NODELIST": nodes}).address == first


def test_a_given_meeting_point_wins_under_srun() -> None:
    """MASTER_ADDR and MASTER_PORT override what is derived from the job."""
    rank = Rank.from_environment({**SRUN, "MASTER_ADDR": "there", "MASTER_PORT": "7"})
    assert (rank.address, rank.port) == ("there", 7)


CONTRADICTIONS = [
    ({**TORCHRUN, "RANK": "8"}, "RANK and WORLD_SIZE", "rank 8 does not exist in a world of 8"),
    ({**TORCHRUN, "RANK": "-1"}, "RANK and WORLD_SIZE", "rank -1 does not exist"),
    ({**TORCHRUN, "WORLD_SIZE": "0"}, "RANK and WORLD_SIZE", "rank 5 does not exist in a world of 0"),
    ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK and LOCAL_WORLD_SIZE", "local rank 4 does not exist among 4"),
    ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE and WORLD_SIZE", "this host cannot run 9 of 8 ranks"),
    ({"RANK": "0"}, "WORLD_SIZE", "the variable WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "2"}, "RANK", "the variable RANK is not set"),
    ({**TORCHRUN, "WORLD_SIZE": "eight"}, "WORLD_SIZE", "is not a number"),
    ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT", "is not a number"),
    ({**SRUN, "SLURM_PROCID": "8"}, "SLURM_PROCID and SLURM_STEP_NUM_TASKS", "rank 8 does not exist"),
    ({**SRUN, "SLURM_LOCALID": "4"}, "SLURM_LOCALID and SLURM_STEP_TASKS_PER_NODE", "local rank 4 does not exist"),
    ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID and SLURM_STEP_TASKS_PER_NODE", "node 2 does not exist among 2"),
    ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(y2)"}, "SLURM_STEP_TASKS_PER_NODE", "is no list of counts"),
    ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID", "is not set"),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "9"}, "OMPI_COMM_WORLD_RANK", "rank 9 does not exist"),
    ({**HYDRA, "MPI_LOCALRANKID": "4"}, "MPI_LOCALRANKID and MPI_LOCALNRANKS", "local rank 4"),
    ({k: v for k, v in OPEN_MPI.items() if k != "MASTER_ADDR"}, "MASTER_ADDR", "spans several hosts"),
]


@pytest.mark.parametrize(("env", "where", "says"), CONTRADICTIONS)
def test_contradictions_name_the_variable(env: dict[str, str], where: str, says: str) -> None:
    """Missing, garbled and contradicting variables are a LaunchError that names them."""
    with pytest.raises(LaunchError) as caught:
        Rank.from_environment(env)
    assert caught.value.code == "PT310"
    assert caught.value.exit_code == 2
    assert where in (caught.value.where or "")
    assert says in caught.value.message


def test_mpirun_on_one_host_needs_no_address() -> None:
    """Where all ranks share a host, they meet on it."""
    env = {k: v for k, v in OPEN_MPI.items() if k != "MASTER_ADDR"}
    env |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}
    assert Rank.from_environment(env).address == "127.0.0.1"


@pytest.mark.parametrize(("text", "level"), [("", None), ("DEBUG", "debug"), (" error ", "error")])
def test_the_log_level_is_read(text: str, level: str | None) -> None:
    """POWERTRAIN_LOG is read whatever its case; empty is unset."""
    assert environment.log_level({"POWERTRAIN_LOG": text}) == level


def test_an_unknown_log_level_is_refused() -> None:
    """A level that does not exist is a LaunchError that lists those that do."""
    with pytest.raises(LaunchError, match="POWERTRAIN_LOG names no level") as caught:
        environment.log_level({"POWERTRAIN_LOG": "loud"})
    assert caught.value.expected == "debug, info, warning, error"


def test_exported_variables_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables set for children are there within the block and as before after it, an exception included."""
    monkeypatch.setenv("POWERTRAIN_TEST_OLD", "old")
    monkeypatch.delenv("POWERTRAIN_TEST_NEW", raising=False)
    with (
        pytest.raises(RuntimeError),
        environment.exported({"POWERTRAIN_TEST_OLD": "other", "POWERTRAIN_TEST_NEW": "new"}),
    ):
        assert (os.environ["POWERTRAIN_TEST_OLD"], os.environ["POWERTRAIN_TEST_NEW"]) == ("other", "new")
        raise RuntimeError
    assert os.environ["POWERTRAIN_TEST_OLD"] == "old"
    assert "POWERTRAIN_TEST_NEW" not in os.environ


@pytest.mark.parametrize(
    ("text", "names"), [("a, b", {"a", "b"}), ('["a", "b"]', {"a", "b"}), ("", set()), ("3", set())]
)
def test_disabled_plugins_are_read(text: str, names: set[str]) -> None:
    """The variable takes an array or names with commas."""
    assert environment.disabled_plugins({environment.DISABLE: text}) == names
