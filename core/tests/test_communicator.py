"""What the base classes of communicators do for those that leave something out."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from powertrain.mesh import Mesh
from powertrain.roles.communicator import SingleProcess, WrappedCommunicator


class Remembering(SingleProcess):
    """Keeps something, and does not say which names it wants."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take all."""


class RememberingWrapper(WrappedCommunicator):
    """The same around another."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take all."""


def test_who_loads_state_wants_it() -> None:
    """Of an earlier run's state nothing is read for who has no use for it, and all for who does not choose."""
    mesh, device = Mesh.build(1, 0), torch.device("cpu")
    nothing, all_of_it = SingleProcess(mesh, device), Remembering(mesh, device)
    assert not nothing.wants("x")
    assert all_of_it.wants("x")
    assert not WrappedCommunicator(nothing).wants("x")
    assert WrappedCommunicator(all_of_it).wants("x")
    assert RememberingWrapper(nothing).wants("x")


def test_an_unknown_reduction_is_refused_before_it_travels() -> None:
    """Whoever carries it, a name that means nothing is an error that lists those that do."""
    with pytest.raises(ValueError, match=r"'reduction' must be in .*'sum', 'mean', 'max', 'min'"):
        SingleProcess(Mesh.build(1, 0), torch.device("cpu")).all_reduce(torch.zeros(1), reduction="avg")  # type: ignore[arg-type]
