"""The choice of algorithms over gloo: measured once, kept, agreed on, pinned; and each gives the right result."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from powertrain.environment import Rank
from powertrain.mesh import WORLD, Mesh
from powertrain.roles.communicator import Collective
from powertrain_comm import tables
from powertrain_comm.algorithms import CLASSES, HELD, RULE, Table, possible, times_from_json, times_to_json
from powertrain_comm.measure import BUDGET, _Contest
from powertrain_comm.pairwise import Exchange
from powertrain_comm.transport import TorchCommunicator

LARGE = CLASSES[1]
"""Bytes of the tensors that the table counts for."""


def connect(cache, setting, **sizes):
    rank = Rank.from_environment()
    mesh = Mesh.build(rank.world_size, rank.index, sizes)
    comm = TorchCommunicator("gloo", torch.device("cpu"), mesh, rank, 30.0)
    if setting is not None:
        with cached_in(cache):
            comm.choose_algorithms(setting, rank)
    return comm


@contextmanager
def cached_in(cache):
    """Let the cache be elsewhere, and leave the process as it was: other tests go on in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POWERTRAIN_CACHE", str(cache))
        yield


def chosen(comm):
    """Return each group's choices, as JSON has them."""
    return {
        name: [group.table.algorithm(operation, least) for operation in RULE for least in CLASSES]
        for name, group in comm._groups.items()
        if group is not None
    }


def write(cache, ranks, winner, hosts=1):
    """Leave a table in which ``winner`` is the faster one of everything."""
    loser = "gloo" if winner == "pairwise" else "pairwise"
    times = {name: {least: {winner: 0.001, loser: 0.01} for least in CLASSES} for name in RULE}
    with cached_in(cache):
        tables.save(tables.facts(ranks, hosts), times)


# --- the table ------------------------------------------------------------------------------------------------

pairs = st.fixed_dictionaries({name: st.floats(1e-6, 10.0) for name in ("pairwise", "gloo")})
measured = st.fixed_dictionaries({}, optional={name: st.dictionaries(st.sampled_from(CLASSES), pairs) for name in RULE})


@given(measured)
def test_times_survive_the_file_and_choose_the_same(times):
    """What is read back is what was written, and chooses alike."""
    again = times_from_json(json.loads(json.dumps(times_to_json(times))))
    assert again == times
    assert Table.from_times(again) == Table.from_times(times)


@given(measured, st.sampled_from(sorted(RULE)), st.integers(0, 1 << 30))
def test_the_table_chooses_the_faster_one(times, operation, nbytes):
    """A clearly faster algorithm is taken; small messages and unmeasured operations go by the rule."""
    choice = Table.from_times(times).algorithm(operation, nbytes)
    rule = RULE[operation]
    least = max((least for least in CLASSES if least <= nbytes), default=None)
    if least is None or not times.get(operation):
        assert choice == rule
    elif least in times[operation]:
        found = times[operation][least]
        assert found[choice] <= min(found.values()) * 1.15
    assert Table.pinned("gloo").algorithm(operation, nbytes) == "gloo"
    assert Table.pinned("pairwise").algorithm(operation, nbytes) == rule


def test_a_size_that_was_not_measured_does_as_the_smaller_one():
    """But an all-reduce by direct exchanges, which moves more than gloo's, is never guessed."""
    fast = {CLASSES[0]: {"gloo": 1.0, "pairwise": 2.0}}
    slow = {CLASSES[0]: {"gloo": 2.0, "pairwise": 1.0}}
    table = Table.from_times({"all_gather": fast, "all_reduce": slow})
    assert table.algorithm("all_gather", 1 << 26) == "gloo"
    assert table.algorithm("all_reduce", CLASSES[0]) == "pairwise"
    assert table.algorithm("all_reduce", CLASSES[1]) == "gloo"
    assert "all_gather pairwise, gloo from 64 KiB" in table.describe()


def test_a_direct_all_reduce_holds_little():
    """What it would receive is bounded."""
    assert possible("all_reduce", HELD // 3, 4)
    assert not possible("all_reduce", HELD // 3 + 1, 4)
    assert possible("reduce_scatter", 1 << 30, 64)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"all_gather": 1},
        {"barrier": {}},
        {"all_gather": {"1": {}}},
        {"all_gather": {"65536": {"gloo": "1"}}},
        {"all_gather": {"65536": {"gloo": float("nan")}}},
        {"all_gather": {"65536": {"gloo": 0}}},
        {"all_gather": {"65536": {"gloo": True}}},
        {"all_gather": {"65536": {"mpi": 1.0}}},
    ],
)
def test_what_is_no_table_is_seen(value):
    """Anything else than positive seconds of known algorithms is refused."""
    assert times_from_json(value) is None


# --- the file -------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path))
    return tmp_path


TIMES = {"all_gather": {CLASSES[0]: {"gloo": 1.0, "pairwise": 2.0}}}


def test_a_file_is_found_by_what_it_holds_for(cache):
    """Another number of ranks or hosts, another torch: another file; nothing is left beside it."""
    mine = tables.facts(2, 1)
    assert tables.load(mine) is None
    tables.save(mine, TIMES)
    assert tables.load(mine) == TIMES
    for other in (tables.facts(3, 1), tables.facts(2, 2), {**mine, "torch": "0"}, {**mine, "processor": ""}):
        assert tables.load(other) is None
    assert [file.name for file in (cache / "comm").iterdir()] == [tables.place(mine).name]


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000, '{"facts": {}, "seconds": {}}', "null"])
def test_a_damaged_file_counts_as_none(cache, caplog, text):
    """Whatever is in its place, it is told, and nothing is read from it."""
    mine = tables.facts(2, 1)
    tables.save(mine, TIMES)
    tables.place(mine).write_text(text, encoding="latin-1")
    with caplog.at_level(logging.WARNING, "powertrain.comm"):
        assert tables.load(mine) is None
    assert "measured anew" in caplog.text


def test_a_table_of_other_facts_is_not_taken(cache):
    """A file that was copied to another one's name does not count."""
    tables.save(tables.facts(2, 1), TIMES)
    tables.place(tables.facts(2, 1)).rename(tables.place(tables.facts(3, 1)))
    assert tables.load(tables.facts(3, 1)) is None


def test_a_directory_that_cannot_be_written_is_told(cache, caplog):
    """The run goes on."""
    (cache / "comm").write_text("")
    with caplog.at_level(logging.WARNING, "powertrain.comm"):
        tables.save(tables.facts(2, 1), TIMES)
    assert "measured at every start" in caplog.text


# --- the measuring --------------------------------------------------------------------------------------------


class Clock:
    """Stands for the council of one rank, on which every collective takes a fixed time."""

    leads = True

    def __init__(self, seconds):
        self.seconds, self.spent, self.calls = seconds, 0.0, 0

    def slowest(self, values):
        if len(values) == 1:
            return values
        self.calls += 1
        self.spent += self.seconds
        return [self.seconds, self.spent]


class Alone:
    """The part of a group that a contest looks at."""

    ranks = (0, 1)


@pytest.mark.parametrize("seconds", [0.0001, 0.01, 0.1, 10.0])
def test_measuring_ends_with_its_budget(seconds, monkeypatch):
    """However slow the network, at most one comparison goes beyond it."""
    monkeypatch.setattr(_Contest, "_time", lambda self, *which: 0.0)
    clock = Clock(seconds)
    times = _Contest(Alone(), None).run(clock, BUDGET)
    assert clock.spent <= BUDGET + 2 * seconds
    assert times_from_json(json.loads(json.dumps(times_to_json(times)))) == times


def measure(cache):
    comm = connect(cache, "measured", tensor=2)
    with cached_in(cache):
        comm.split(WORLD, 2)
    found = chosen(comm)
    assert any("algorithms" in fact for fact in comm.describe())
    comm.close()
    return found


def test_ranks_agree_and_later_runs_read_what_was_measured(ranks, tmp_path):
    """One file for each size of group; the next start, and a split, write none, and every rank chooses alike."""
    found = ranks(4, measure, tmp_path)
    assert all(one == found[0] for one in found)
    assert found[0]["tensor"] == found[0]["data"] == found[0]["world.within2"]
    files = {file: (file.read_bytes(), file.stat().st_ino) for file in (tmp_path / "comm").iterdir()}
    assert sorted(file.name.partition("-ranks-")[0] for file in files) == ["2", "4"]
    assert ranks(4, measure, tmp_path) == found
    assert files == {file: (file.read_bytes(), file.stat().st_ino) for file in (tmp_path / "comm").iterdir()}


def own_caches(directory, damaged):
    """Start with a directory for each rank: rank 0's says one thing, the others' another."""
    me = Rank.from_environment().index
    cache = directory / str(me)
    write(cache, 2, "pairwise" if me else "gloo")
    if me == 0 and damaged:
        tables.place(tables.facts(2, 1)).write_text("{")
    comm = connect(cache, "measured")
    found = chosen(comm)
    comm.close()
    return found


@pytest.mark.parametrize("damaged", [False, True])
def test_all_follow_rank_0(ranks, tmp_path, damaged):
    """Its table is everybody's, whatever the others have; where its own is damaged all measure, and it is mended."""
    found = ranks(2, own_caches, tmp_path, damaged)
    assert found[0] == found[1]
    if not damaged:
        assert set(found[0][WORLD]) == {"gloo"}
        return
    (file,) = (tmp_path / "0" / "comm").iterdir()
    assert times_from_json(json.loads(file.read_text())["seconds"])


def pinned(cache, setting):
    comm = connect(cache, setting)
    found = {}
    for operation in RULE:
        handle, *_ = _start(comm, operation, torch.float32, LARGE)
        found[operation] = isinstance(handle, Exchange)
        handle.wait()
    comm.close()
    return found


@pytest.mark.parametrize("setting", ["pairwise", "gloo", None])
def test_a_pinned_choice_measures_nothing(ranks, tmp_path, setting):
    """What is named is what is done, whatever a table says, and no file is written."""
    write(tmp_path, 2, "gloo" if setting == "pairwise" else "pairwise")
    before = sorted((tmp_path / "comm").iterdir())
    direct = setting != "gloo"
    expected = {"all_gather": direct, "reduce_scatter": direct, "all_reduce": False}
    assert ranks(2, pinned, tmp_path, setting) == [expected] * 2
    assert sorted((tmp_path / "comm").iterdir()) == before


# --- the results ----------------------------------------------------------------------------------------------


def _numbers(rank, count, dtype):
    """Return numbers whose sums are exact in every type, so that all orders of addition give the same."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 16, (count,), generator=generator).to(dtype)


def _start(comm, operation, dtype, nbytes, *, reduction="sum", in_place=False, grad=False):
    """Start one collective; return its handle, what it fills, what is to be there, and what must not change."""
    n, me = comm.world_size, comm.rank
    size = nbytes // dtype.itemsize // n
    wholes = [_numbers(rank, n * size, dtype) for rank in range(n)]
    combine = {"sum": sum, "mean": lambda terms: sum(terms) / n}.get(reduction)
    total = combine(wholes) if combine else getattr(torch.stack(wholes), "a" + reduction)(0)
    whole, mine = wholes[me].clone(), slice(me * size, (me + 1) * size)
    if operation == "all_reduce":
        return comm.all_reduce(whole, reduction=reduction), whole, total, None
    if operation == "reduce_scatter":
        output = whole[mine] if in_place else torch.zeros(size, dtype=dtype)
        kept = [
            (whole[: me * size], wholes[me][: me * size]),
            (whole[(me + 1) * size :], wholes[me][(me + 1) * size :]),
        ]
        return comm.reduce_scatter(output, whole, reduction=reduction), output, total[mine], kept
    output = torch.zeros(n * size, dtype=dtype)
    piece = output[mine] if in_place else torch.zeros(size, dtype=dtype)
    piece.copy_(wholes[me][:size])
    if grad:
        output.requires_grad_()
        piece = piece.clone().requires_grad_()
    expected = torch.cat([other[:size] for other in wholes])
    return comm.all_gather(output, piece), output, expected, [(piece, wholes[me][:size])]


def results(cache, winner):
    comm = connect(cache, "measured")
    assert set(chosen(comm)[WORLD]) == {winner}
    cases = []
    for kind in ("float32", "bfloat16", "float16", "float64", "int64", "uint8"):
        dtype = getattr(torch, kind)
        reductions = ["sum", "max", "min"] + ["mean"] * dtype.is_floating_point
        cases += [("all_reduce", dtype, reduction, False) for reduction in reductions]
        cases += [("reduce_scatter", dtype, reduction, place) for reduction in reductions for place in (False, True)]
        cases += [("all_gather", dtype, "sum", place) for place in (False, True)]
    count = 12 * comm.world_size  # so that pieces of every type are whole
    for operation, dtype, reduction, in_place in cases:
        case = f"{operation} of {dtype}, {reduction}, in place: {in_place}"
        handle, output, expected, kept = _start(
            comm, operation, dtype, LARGE // count * count, reduction=reduction, in_place=in_place
        )
        # Sums in 16 bits stay exact, whatever is faster.
        narrow = operation == "reduce_scatter" and dtype.itemsize == 2 and reduction in ("sum", "mean")
        assert isinstance(handle, Exchange) == (winner == "pairwise" or narrow), case
        handle.wait()
        assert torch.equal(output, expected.to(dtype)), case
        for tensor, before in kept or ():
            assert torch.equal(tensor, before), case
    handle, output, expected, _ = _start(comm, "all_gather", torch.float32, LARGE // count * count, grad=True)
    handle.wait()
    assert torch.equal(output.detach(), expected)
    comm.close()


@pytest.mark.parametrize("winner", ["pairwise", "gloo"])
def test_each_algorithm_gives_the_reference(ranks, tmp_path, winner):
    """Every operation, type and reduction, in place or not; inputs stay as they were."""
    write(tmp_path, 3, winner)
    ranks(3, results, tmp_path, winner)


def issued_together(cache):
    comm = connect(cache, "measured")
    n = comm.world_size
    pieces = [torch.full((size,), float(comm.rank)) for size in (8, LARGE // 4 // n, LARGE // 4 // n)]
    wholes = [torch.full((piece.numel() * n,), 2.0) for piece in pieces]
    totals = [whole.clone() for whole in wholes]
    gathered, scattered = [torch.zeros_like(x) for x in wholes], [torch.zeros_like(x) for x in pieces]

    def one(operation, source, target, reduction="sum"):
        return Collective(operation=operation, dimension="data", input=source, output=target, reduction=reduction)

    batch = [one("all_gather", *pair) for pair in zip(pieces, gathered, strict=True)]
    batch += [one("reduce_scatter", *pair, "mean") for pair in zip(wholes, scattered, strict=True)]
    batch += [one("all_reduce", total, total) for total in totals]
    comm.issue_together(batch).wait()
    for piece, whole in zip(scattered, gathered, strict=True):
        assert torch.equal(whole.view(n, -1), torch.arange(float(n))[:, None].expand(n, piece.numel()))
        assert torch.equal(piece, torch.full_like(piece, 2.0))
    assert all(bool((total == 2.0 * n).all()) for total in totals)
    comm.all_gather(torch.empty(0), torch.empty(0)).wait()
    with pytest.raises(ValueError, match=r"3 of torch\.float32 do not fit 50000 of torch\.float32"):
        comm.all_gather(torch.zeros(50000), torch.zeros(3))
    comm.close()


@pytest.mark.parametrize("winner", ["pairwise", "gloo"])
def test_large_and_small_ones_are_issued_together(ranks, tmp_path, winner):
    """Those that gloo joins, and those that are exchanged, in one call; what does not fit is refused alike."""
    write(tmp_path, 2, winner)
    ranks(2, issued_together, tmp_path)
