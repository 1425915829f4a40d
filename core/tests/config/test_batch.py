"""The batch triple: any two give the third, and what does not fit is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powertrain.config import read, resolve_batch, structure
from powertrain.config.tables import Batch
from powertrain.errors import ConfigError

SIZES = st.integers(1, 64)


@given(SIZES, SIZES, SIZES)
def test_any_two_derive_the_third(micro: int, accumulation: int, ranks: int) -> None:
    """Leaving out one of the three gives the same sizes, and the one left out says what it comes from."""
    total = micro * accumulation * ranks
    full = {"micro": micro, "accumulation": accumulation, "total": total}
    for missing in (None, *full):
        sizes = resolve_batch(Batch(**{key: value for key, value in full.items() if key != missing}), ranks)
        assert (sizes.micro, sizes.accumulation, sizes.total) == (micro, accumulation, total)
        assert list(sizes.origins) == ([f"batch.{missing}"] if missing else [])


@pytest.mark.parametrize(
    ("given_sizes", "sizes", "origins"),
    [
        ({}, (1, 1, 4), {"total": "derived from 4 ranks", "micro": "default", "accumulation": "default"}),
        ({"micro": 8}, (8, 1, 32), {"total": "derived from batch.micro x 4 ranks", "accumulation": "default"}),
        ({"accumulation": 8}, (1, 8, 32), {"total": "derived from batch.accumulation x 4 ranks", "micro": "default"}),
        ({"total": 32}, (8, 1, 32), {"micro": "derived from batch.total / 4 ranks", "accumulation": "default"}),
        (
            {"total": 32, "accumulation": 2},
            (4, 2, 32),
            {"micro": "derived from batch.total / (batch.accumulation x 4 ranks)"},
        ),
        (
            {"total": 32, "micro": 2},
            (2, 4, 32),
            {"accumulation": "derived from batch.total / (batch.micro x 4 ranks)"},
        ),
    ],
)
def test_what_is_left_out_has_an_origin(
    given_sizes: dict[str, int], sizes: tuple[int, int, int], origins: dict[str, str]
) -> None:
    """Sizes that nobody set are the default 1 or are derived, and say from what."""
    made = resolve_batch(Batch(**given_sizes), 4)
    assert (made.micro, made.accumulation, made.total) == sizes
    assert {path: str(origin) for path, origin in made.origins.items()} == {
        f"batch.{key}": text for key, text in origins.items()
    }


@pytest.mark.parametrize(
    ("sizes", "ranks", "message"),
    [
        (
            {"micro": 8, "accumulation": 4, "total": 48},
            2,
            (
                "micro 8 x accumulation 4 x 2 ranks = 64, but total = 48; "
                "did you mean total = 64, accumulation = 3 or micro = 6?"
            ),
        ),
        (
            {"micro": 8, "accumulation": 4, "total": 7},
            1,
            "micro 8 x accumulation 4 x 1 rank = 32, but total = 7; did you mean total = 32?",
        ),
        (
            {"micro": 8, "total": 50},
            2,
            "micro 8 x 2 ranks = 16 does not divide total = 50; did you mean total = 48 or total = 64?",
        ),
        ({"total": 3}, 4, "4 ranks = 4 does not divide total = 3; did you mean total = 4?"),
    ],
)
def test_what_does_not_fit_shows_the_arithmetic(sizes: dict[str, int], ranks: int, message: str) -> None:
    """Sizes that contradict one another are one problem with the product and the nearest sizes that work."""
    with pytest.raises(ConfigError) as error:
        resolve_batch(Batch(**sizes), ranks)
    (problem,) = error.value.problems
    assert str(problem) == f"batch.total: {message}"


def test_a_contradiction_has_the_place_of_the_total() -> None:
    """With the origins at hand, the problem says where the total was set."""
    config = structure(read({"batch": {"micro": 2}}, overrides=["batch.total=6"], environ={}), {})
    with pytest.raises(ConfigError) as error:
        resolve_batch(config.batch, 2, config.origins)
    assert error.value.problems[0].where == "--set batch.total"
