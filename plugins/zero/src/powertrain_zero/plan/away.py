"""What rests elsewhere than on the device, and what bringing it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import attrs

from powertrain.plugin import Rest
from powertrain_zero.gradients import IN_FLIGHT
from powertrain_zero.work import AHEAD

if TYPE_CHECKING:
    from powertrain_zero.plan.estimate import Case, Piece
    from powertrain_zero.plan.probe import OptimizerFacts

LEAST = {"optimizer": 1, "gradients": 2, "parameters": 3}
"""The stage from which a category may rest elsewhere."""


def resting(rests: Mapping[str, Rest], stage: int, *, on_host: bool) -> dict[str, Rest]:
    """Return what moves at a stage; where the device's memory is the host's, what rests on the host does not."""
    moves = {name: rest for name, rest in rests.items() if not (on_host and rest.place == "host")}
    return {name: rest for name, rest in moves.items() if stage >= LEAST.get(name, 4)}


def stage_alone(rests: Mapping[str, Rest]) -> Literal[1, 2, 3]:
    """Return the stage of one rank, whose state on the device stays whole."""
    return 3 if "parameters" in rests else 2 if "gradients" in rests else 1


@attrs.frozen(kw_only=True)
class Away:
    """Bytes of one rank that are not the device's.

    Attributes:
        parameters, gradients, optimizer: what the device is spared of each.
        host: what rests in the host's memory.
        disk: what rests on disks.
        transfers: host memory for what is on its way.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    host: int = 0
    disk: int = 0
    transfers: int = 0


def away(
    pieces: Iterable[Piece], case: Case, rests: Mapping[str, Rest], optimizer: OptimizerFacts, state: int, stage: int
) -> Away:
    """Add up what moves.

    Args:
        pieces: the flat buffers of a run.
        case: its formats.
        rests: what moves.
        optimizer: what it keeps.
        state: bytes of the optimizer's state of this rank.
        stage: 1 to 3.
    """
    if not rests:
        return Away()
    recipe = case.recipe
    master, accumulate = recipe.master.itemsize, recipe.accumulate.itemsize
    spared: dict[str, int] = defaultdict(int)
    moved: dict[str, int] = defaultdict(int)
    units: dict[int, int] = defaultdict(int)
    chunk = per_element = sources = trainable = 0
    for piece in pieces:
        apart = piece.trainable and "optimizer" in rests and (piece.itemsize != master or not case.on_host)
        own = piece.itemsize if apart or not piece.trainable else master
        if stage == 3 and "parameters" in rests:
            spared["parameters"] += piece.slice * (own if not apart else master)
            moved["parameters"] += piece.slice * own
        if apart:
            # Masters of their own: on the device they would be the slice, or lie beside whole buffers.
            share = rests["optimizer"].share
            beside = piece.slice * (master if stage == 3 or piece.itemsize != master else 0)
            on_device = piece.slice * piece.itemsize if stage == 3 and "parameters" not in rests else 0
            kept = int(piece.slice * master * (1 - share))
            if stage < 3 or "parameters" not in rests:
                spared["parameters"] += beside - on_device - kept
            moved["optimizer"] += int(piece.slice * master * share)
        if piece.trainable:
            trainable += piece.slice
            moved["gradients"] += piece.slice * accumulate if "gradients" in rests else 0
            chunk = max(chunk, piece.slice)
        units[piece.unit] += piece.slice
        sources = max(sources, own)
        per_element = max(per_element, (master if apart or "parameters" in rests else 0) + (own if apart else 0))
    spared["gradients"] = moved["gradients"]
    if "optimizer" in rests:
        spared["optimizer"] = int(state * rests["optimizer"].share)
        moved["optimizer"] += spared["optimizer"]
        per_element += state // max(1, trainable)
    per_element += accumulate if "gradients" in rests else 0
    places: dict[str, int] = defaultdict(int)
    for name, rest in rests.items():
        places[rest.place] += moved[name]
    grain = min(rest.grain for rest in rests.values()) // master
    chunk = min(chunk, grain) if optimizer.pieces else chunk
    unit = max(units.values(), default=0)
    # Beside the chunks under way: state that the first update makes, and copies of gradients for torch's optimizers.
    update = (AHEAD + 2) * chunk * per_element + chunk * (state // max(1, trainable) if "optimizer" in rests else 0)
    update += 0 if optimizer.flat else chunk * master
    passes = (2 * unit * sources if "parameters" in rests else 0) + (
        IN_FLIGHT * unit * accumulate if "gradients" in rests else 0
    )
    limit = max(rest.buffers for rest in rests.values())
    # Buffers of one use are kept for the next while there is room.
    transfers = max(update, passes, min(update + passes, limit)) if "disk" in places else 0
    return Away(
        parameters=spared["parameters"],
        gradients=spared["gradients"],
        optimizer=spared["optimizer"],
        host=places["host"],
        disk=places["disk"],
        transfers=transfers,
    )
