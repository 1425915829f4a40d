"""What ``powertrain config check`` finds in a [zero] table before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from powertrain.cli.root import cli


@pytest.fixture
def check(tmp_path: Path):
    def invoke(text: str, *arguments: str) -> Result:
        path = tmp_path / "a.toml"
        path.write_text(text)
        return CliRunner().invoke(cli, ["config", "check", str(path), *arguments])

    return invoke


def test_ranks_that_groups_do_not_divide(check) -> None:
    """--ranks says which group sizes and which numbers of ranks would do; without it there is nothing to compare."""
    table = "[zero]\nstage = 3\nshard_group = 4\n"
    assert check(table).exit_code == 0
    assert check(table, "--ranks", "8").exit_code == 0
    result = check(table, "--ranks", "6")
    assert result.exit_code == 2
    for part in ("zero.shard_group", "a divisor of 6: 1, 2, 3, 6", "start 4 or 8 ranks"):
        assert part in result.stderr


def test_a_requirement_without_the_table(check) -> None:
    """Requiring the plugin without its section names the key that has no default, and what it takes."""
    result = check('[plugins]\nrequire = ["zero"]\n')
    assert result.exit_code == 2
    for part in ("a.toml:2", "zero.stage: required key is missing", "[zero] is not on", "expected 1, 2 or 3"):
        assert part in result.stderr
