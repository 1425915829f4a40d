"""The hooks: which transport is chosen, when the watchdog is put around it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from powertrain.environment import Rank
from powertrain.errors import CollectiveDiverged, CommunicatorMissing, LaunchError, ShardingError
from powertrain.mesh import Mesh
from powertrain.roles.communicator import SingleProcess
from powertrain.testing.null import NullHost
from powertrain_comm.config import CommConfig
from powertrain_comm.plugin import CommPlugin


class Host:
    """The part of an accelerator that the hooks look at."""

    def __init__(self, *backends):
        self._backends = backends

    def backends(self):
        return self._backends

    def device(self, index):
        return torch.device("cpu")


def make(name, accelerator, **settings):
    plugin = CommPlugin(CommConfig(**settings))
    rank = Rank.from_environment()
    mesh = Mesh.build(rank.world_size, rank.index)
    return plugin, plugin.make_communicator(name, accelerator, mesh, rank, 20.0)


def test_the_plugin_imports_no_torch():
    """Importing the entry point's module loads no torch."""
    code = "import sys, powertrain_comm.plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["nosuch", "undefined", "fake"])
def test_unknown_transports_are_declined(name):
    """A name that torch.distributed does not know, or that moves no data, is left to other plugins."""
    assert make(name, Host("gloo"))[1] is None


def test_no_transport_for_the_accelerator_is_declined():
    """An accelerator whose libraries this torch lacks gets nothing, not something wrong."""
    assert make(None, Host("nosuch"))[1] is None


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="needs a torch without NCCL")
def test_a_transport_that_torch_was_built_without_is_an_error():
    """A transport that is asked for by name and missing is an error that says what there is."""
    with pytest.raises(CommunicatorMissing, match="nccl") as caught:
        make("nccl", Host("gloo"))
    assert "expected: gloo" in str(caught.value)


def test_cross_check_needs_the_watchdog():
    """The combination that cannot work is refused."""
    with pytest.raises(ValueError, match="watchdog"):
        CommConfig(watchdog=False, cross_check=True)


def test_a_single_process_is_not_watched():
    """A world of one has nobody to wait for."""
    alone = SingleProcess(Mesh.build(1, 0), torch.device("cpu"))
    assert CommPlugin(CommConfig()).wrap_communicator(alone, NullHost(), 1.0) is None


def chosen_and_wrapped():
    plugin, comm = make(None, Host("nosuch", "gloo"))
    watched = plugin.wrap_communicator(comm, Host("gloo"), 20.0)
    facts = watched.describe()
    watched.close()
    plugin, comm = make("gloo", Host("gloo"), watchdog=False)
    bare = plugin.wrap_communicator(comm, Host("gloo"), 20.0)
    comm.close()
    return facts, bare


def test_the_first_available_transport_is_chosen_and_watched(ranks):
    """Without a name the accelerator's first available library is used, and the watchdog is on by default."""
    for facts, bare in ranks(2, chosen_and_wrapped):
        assert facts["library"] == "torch.distributed (gloo)"
        assert facts["watchdog"] == "on"
        assert bare is None


def two_engines(cross_check):
    plugin, first = make(None, Host("gloo"), cross_check=cross_check)
    hook = sys.excepthook
    first = plugin.wrap_communicator(first, Host("gloo"), 20.0)
    _, second = make(None, Host("gloo"))
    second = plugin.wrap_communicator(second, Host("gloo"), 20.0)
    a, b = torch.ones(3), torch.ones(3)
    for handle in first.all_reduce(a, label="a"), second.all_reduce(b, label="b"):
        handle.wait()
    gathered = second.gather_json(second.rank)
    first.close()
    second.barrier().wait()
    second.close()
    return a.tolist(), b.tolist(), gathered, sys.excepthook is hook


@pytest.mark.parametrize("cross_check", [False, True])
def test_two_watched_communicators_work_side_by_side(ranks, cross_check):
    """Two watched communicators serve one process, close in any order, and restore the exception hook."""
    assert ranks(2, two_engines, cross_check) == [([2.0] * 3, [2.0] * 3, [0, 1], True)] * 2


def cut(cross_check):
    plugin, comm = make(None, Host("gloo"), cross_check=cross_check)
    comm = plugin.wrap_communicator(comm, Host("gloo"), 20.0)
    with pytest.raises(ShardingError, match="not connected"):
        comm.barrier("data.within2")
    with pytest.raises(LaunchError, match="no mesh dimension is called 'model'"):
        comm.barrier("model")
    within, across = comm.split("data", 2)
    assert comm.split("data", 2) == (within, across)
    sums = []
    for name in (within, across, *comm.split("data", 4), *comm.split("data", 1)):
        tensor = torch.tensor([2.0**comm.rank])
        comm.all_reduce(tensor, name).wait()
        sums.append(tensor.item())
    facts = comm.describe()["groups"]
    comm.close()
    return sums, facts


@pytest.mark.parametrize("cross_check", [False, True])
def test_a_watched_dimension_can_be_cut(ranks, cross_check):
    """Under the watchdog and the cross-check, derived dimensions join their ranks; before it they are refused."""
    for rank, (sums, facts) in enumerate(ranks(4, cut, cross_check)):
        assert sums == [3 if rank < 2 else 12, 5 if rank % 2 == 0 else 10, 15, 2**rank, 2**rank, 15]
        assert "data.within2 2, data.across2 2, data.within4 4, data.across1 4" in facts


def cut_differently():
    plugin, comm = make(None, Host("gloo"))
    comm = plugin.wrap_communicator(comm, Host("gloo"), 20.0)
    with pytest.raises(CollectiveDiverged, match="cut the mesh differently") as caught:
        comm.split("data", 1 + comm.rank)
    comm.close()
    return caught.value.found


def test_ranks_that_cut_differently_are_told(ranks):
    """Ranks that call ``split`` with different arguments learn who wanted what, instead of waiting for one another."""
    assert ranks(2, cut_differently) == ["rank 0: 'data' by 1; rank 1: 'data' by 2"] * 2
