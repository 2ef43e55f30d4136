"""The table of attacks: each test marked ``@pytest.mark.attack(ID, WHAT)`` is one row of it.

Such a test takes the fixture `attack` and sets what it found:

    @pytest.mark.attack("H1", "compressed bodies of 40 MB without a token, 8 connections")
    async def test_a_compressed_body_is_refused(attack: Attack) -> None:
        attack.tried = 200
        attack.result = "refused with 401 before a byte is unpacked; operator p99 12 ms"

The numbers in `result` come from the run, never from the source. A row exists only if its test passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BEGIN, END = "<!-- attacks -->", "<!-- /attacks -->"


@dataclass(slots=True)
class Attack:
    """Result of a test: the number of tries, and what happened, with figures."""

    tried: int = 0
    result: str = ""


@pytest.fixture
def attack(request: pytest.FixtureRequest) -> Iterator[Attack]:
    """The row of the table that this test fills."""
    found = Attack()
    yield found
    marker = request.node.get_closest_marker("attack")
    assert marker, "a test that uses `attack` carries @pytest.mark.attack(ID, WHAT)"
    assert found.tried > 0, "set attack.tried: how often the attack was tried"
    assert found.result, "set attack.result: what happened, with figures"
    row = (*marker.args, found.tried, found.result)
    request.node.user_properties.append(("attack", row))


class Rows:
    """A plugin that collects the rows of the passed tests, also from xdist's workers."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, int, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" and report.passed:
            self.rows += [value for name, value in report.user_properties if name == "attack"]

    def markdown(self) -> str:
        """The table, ordered by ID."""
        lines = ["| | Attack | Times | Result |", "| --- | --- | --- | --- |"]
        for name, what, tried, result in sorted(
            self.rows, key=lambda row: (row[0][0], int(row[0][1:]), row[1])
        ):
            lines.append(f"| {name} | {what} | {tried:,} | {result} |")
        return "\n".join(lines) + "\n"

    def write(self, document: Path) -> None:
        """Replace the table between the two markers in the document."""
        text = document.read_text()
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        document.write_text(f"{before}{BEGIN}\n{self.markdown()}{END}{after}")
