"""The table, and the check of a floor; the benchmarks themselves are not tests."""

from __future__ import annotations

import pytest

from bench.rows import Row, table


@pytest.mark.parametrize(
    ("value", "bound", "holds"),
    [(9.9, "≤ 10", True), (10.1, "≤ 10", False), (0.8, "≥ 0.80", True), (0.7, "≥ 0.80", False)],
)
def test_a_floor_is_kept_or_missed(value: float, bound: str, holds: bool) -> None:
    """A limit applies in the direction of its sign, and includes its own value."""
    assert Row("x", value, "", floor=bound).missed is not holds


def test_the_table_has_a_line_a_row() -> None:
    """Each row is one line of Markdown with figure, unit, floor and target."""
    lines = table([Row("x", 2.0, "×", "≤ 10", "≤ 2", "why")]).splitlines()

    assert lines[-1] == "| x | 2.00 × | ≤ 10 | ≤ 2 | why |"
