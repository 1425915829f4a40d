"""From recorded collectives to the rank that diverged, without any process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from powertrain.mesh import Mesh
from powertrain.roles.communicator import Collective, Done
from powertrain_comm.watchdog.blackbox import SIZE, SLOTS, BlackBox, read
from powertrain_comm.watchdog.diagnosis import State, find_behind, find_divergence, table
from powertrain_comm.watchdog.records import KEPT, Ledger
from powertrain_comm.watchdog.verdict import Verdict, judge, raised


def issue(ledger, operation="all_reduce", dimension="data", size=4, *, over=True, **rest):
    """Record a collective as a communicator's ``issue`` would."""
    tensor = torch.empty(size)
    record = ledger.begin(Collective(operation=operation, dimension=dimension, input=tensor, **rest))
    record.finished = over
    return record


def state(rank, ledger, **flags):
    """Send a ledger's state through JSON, as the board does."""
    facts = json.loads(json.dumps(ledger.state()))
    return State.parse(rank, facts, **{"answered": True, "left": False, **flags})


def both(*scripts):
    """Return the states of ranks that issued what the scripts say: (label, size) pairs."""
    states = {}
    for rank, script in enumerate(scripts):
        ledger = Ledger()
        for number, (label, size) in enumerate(script):
            issue(ledger, label=label, size=size, over=number < len(script) - 1)
        states[rank] = state(rank, ledger)
    return states


MESH = Mesh.build(2, 0)


def test_equal_ranks_do_not_diverge():
    """Ranks that issued the same collectives agree, also when one is further than the other."""
    script = [("a", 4), ("b", 8), ("c", 4)]
    assert find_divergence(MESH, both(script, script[:2]), labels=True) is None


def test_a_difference_in_a_group_of_neighbours_is_found():
    """Along a derived dimension ranks are compared within their group only, in every group."""
    mesh = Mesh.build(4, 0)

    def states(*sizes):
        ledgers = [Ledger() for _ in sizes]
        for ledger, size in zip(ledgers, sizes, strict=True):
            issue(ledger, dimension="data.within2", size=size, over=False)
        return {rank: state(rank, ledger) for rank, ledger in enumerate(ledgers)}

    assert find_divergence(mesh, states(4, 4, 8, 8)) is None
    found = find_divergence(mesh, states(4, 4, 8, 9))
    assert found is not None
    assert (found.dimension, sorted(found.entries)) == ("data.within2", [2, 3])
    missing = {**states(4, 4, 8, 8), 3: state(3, Ledger())}
    assert [line.partition(",")[0] for line in find_behind(mesh, missing)] == [
        "behind: rank 3 has not issued #1 along 'data.within2'"
    ]


def test_the_first_difference_is_found():
    """The earliest collective of another length is the divergence."""
    found = find_divergence(MESH, both([("a", 4), ("b", 8), ("c", 9)], [("a", 4), ("b", 6), ("c", 7)]))
    assert found is not None
    assert (found.dimension, found.number, found.ranks) == ("data", 2, (0, 1))
    assert {rank: entry.shape for rank, entry in found.entries.items()} == {0: (8,), 1: (6,)}


def test_the_minority_is_blamed():
    """Where most ranks agree, the others are the ones that diverged."""
    script, other = [("a", 4), ("b", 8)], [("a", 4), ("b", 6)]
    found = find_divergence(Mesh.build(4, 0), both(script, script, other, script))
    assert found is not None
    assert found.ranks == (2,)


def test_labels_count_only_when_asked():
    """Equal lengths under different labels are a divergence only for one who asks."""
    states = both([("a", 4), ("b", 4)], [("a", 4), ("c", 4)])
    assert find_divergence(MESH, states) is None
    found = find_divergence(MESH, states, labels=True)
    assert found is not None
    assert found.number == 2


def test_groups_are_compared_apart():
    """Ranks of different groups along a dimension may do different things."""
    mesh = Mesh.build(4, 0, {"tensor": 2})
    states = {}
    for rank in range(4):
        ledger = Ledger()
        issue(ledger, dimension="tensor", size=4 + rank // 2)
        states[rank] = state(rank, ledger)
    assert find_divergence(mesh, states) is None


def test_uneven_exchanges_do_not_diverge():
    """Exchanges of different lengths, and sends, are no divergence."""
    states = {}
    for rank in range(2):
        ledger = Ledger()
        issue(ledger, "all_to_all", size=4 + rank)
        issue(ledger, "send" if rank else "receive", size=4 + rank, peer=1 - rank)
        states[rank] = state(rank, ledger)
    assert find_divergence(MESH, states) is None


def test_the_rank_behind_is_named():
    """The rank that never issued what another waits for is named, with what it did last."""
    (line,) = find_behind(MESH, both([("a", 4), ("b", 4), ("c", 4)], [("a", 4), ("b", 4)]))
    assert line.startswith("behind: rank 1 has not issued #3 along 'data'")
    assert "'c'" in line
    assert "#2 all_reduce sum of 'b'" in line


def test_a_missing_send_is_named():
    """A receive that waits names the rank that has not sent."""
    ledger = Ledger()
    issue(ledger, "receive", over=False, peer=1)
    states = {0: state(0, ledger), 1: state(1, Ledger())}
    assert find_behind(MESH, states) == ["behind: rank 1 has not sent what rank 0 waits for"]


def test_the_table_has_a_row_per_rank():
    """The table says of each rank whether it waits, is idle, has left or does not answer."""
    states = both([("a", 4)], [("a", 4)])
    rows = [*states.values(), state(2, Ledger()), State(rank=3), State(rank=4, left=True)]
    head, *lines = table(rows).splitlines()
    assert head.split()[:3] == ["rank", "state", "for"]
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3", "4"]
    for line, word in zip(lines, ["waiting", "waiting", "idle", "no answer", "left"], strict=True):
        assert word in line


@pytest.mark.parametrize(
    ("flags", "stalls", "kind"),
    [
        ({}, True, "stalled"),
        ({"answered": False}, False, "lost"),
        ({"answered": False, "left": True}, False, "lost"),
        ({}, False, None),
    ],
)
def test_the_verdict_follows_from_the_states(flags, stalls, kind):
    """A stall, a dead rank and a rank that left are told apart; without evidence there is no verdict."""
    states = both([("a", 4), ("b", 4)], [("a", 4)])
    states[1] = State(rank=1, counts={"data": 1}, **{"answered": True, "left": False, **flags})
    stalled = states[0].waiting() if stalls else None
    verdict = judge(MESH, states, stalled=stalled, rank=0, timeout=3.0)
    assert (verdict and verdict.kind) == kind


def test_a_verdict_names_the_error_and_the_details():
    """What another rank raised is printed with its traceback, and stands for PeerFailed."""
    try:
        raise ValueError("torn")
    except ValueError as error:
        verdict = raised(3, error)
    assert verdict.full().startswith("rank 3 raised:\nTraceback")
    assert verdict.full().endswith("ValueError: torn\n")
    assert "[PT504] rank 3 raised ValueError: torn" in str(verdict.error())
    assert isinstance(verdict, Verdict)


def test_call_sites_name_this_file():
    """A collective's call site is the first frame outside powertrain's packages."""

    def caller(ledger):
        return issue(ledger)

    facts = caller(Ledger()).facts(0.0)
    assert f"{__file__}:" in facts["site"]


def test_the_ledger_forgets_what_is_over():
    """The ledger keeps a bounded number of finished collectives, and every one under way."""
    ledger = Ledger()
    waiting = issue(ledger, label="first", over=False)
    for _ in range(2 * KEPT):
        issue(ledger)
    assert ledger.oldest() is waiting
    records = ledger.state()["records"]
    assert [record["label"] for record in records if record["waiting"]] == ["first"]
    assert len(records) == KEPT + 1
    waiting.handle = Done()
    assert ledger.oldest() is None


def test_the_black_box_survives_its_writer():
    """The file gives back the last collectives, numbers and labels included, while nobody closed it."""
    ledger, box = Ledger(), BlackBox()
    try:
        for number in range(SLOTS + 20):
            box.write(issue(ledger, label=f"layer {number}", size=number + 1))
        held = read(str(box.path))
        assert held is not None
        assert held["counts"] == {"data": SLOTS + 20}
        newest = held["records"][-1]
        assert (newest["number"], newest["label"], newest["shape"]) == (SLOTS + 20, f"layer {SLOTS + 19}", [SLOTS + 20])
        assert len(held["records"]) == SLOTS
    finally:
        box.close()
    assert read(str(box.path)) is None


def test_the_black_box_starts_over_when_full():
    """More descriptions than the file holds: the newest are still right."""
    ledger, box = Ledger(), BlackBox()
    try:
        count = 3 * SIZE // 1000
        for number in range(count):
            box.write(issue(ledger, label=f"{number:01000d}"))
        held = read(str(box.path))
        assert held is not None
        assert int(held["records"][-1]["label"]) == count - 1
    finally:
        box.close()


LEAVE_A_BOX = """
import os, signal
from powertrain_comm.watchdog.blackbox import BlackBox
print(BlackBox().path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_rank_left_is_removed_by_the_next_run(tmp_path, monkeypatch):
    """A new black box removes files whose process was killed, not those of living ones, fresh ones or others."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = [sys.executable, "-c", LEAVE_A_BOX]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    stale, fresh = (
        Path(subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=False).stdout.strip())
        for _ in range(2)
    )
    other = tmp_path / "powertrain-notes.txt"
    other.touch()
    living = BlackBox()
    for path in (stale, other, living.path):
        os.utime(path, (0, 0))
    assert stale.parent == fresh.parent == tmp_path and stale.exists()
    BlackBox().close()
    assert sorted(tmp_path.iterdir()) == sorted([fresh, other, living.path])
    living.close()
