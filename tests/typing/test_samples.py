"""The samples do what they show, so that they are more than types."""

from __future__ import annotations

import tomllib
from pathlib import Path

from nomad_watchdog.model import PlacementState
from tests.typing import accepted_backend, accepted_registry
from tests.typing.accepted_agent_plugins import REPAIRS

ROOT = Path(__file__).parents[2]


async def test_the_sample_backend_passes_the_check_that_it_runs() -> None:
    """The sample passes a check of the conformance suite, and its placements are listed."""
    assert await accepted_backend.conformance() == ["ensure_twice_is_one"]
    backend = accepted_backend.entry_point(installation="test", shards=1)
    assert await accepted_backend.use(backend) == (PlacementState.RUNNING,)


async def test_the_sample_registry_stores_records_and_documents() -> None:
    """Nothing is lost in a commit to the sample registry."""
    assert await accepted_registry.use(accepted_registry.entry_point("")) == []


def test_a_sample_plugin_ends_with_its_reason() -> None:
    """A sample repair step calls `ended` once."""
    ended: list[tuple[bool | None, str]] = []

    def answer(ok: bool | None, reason: str = "") -> None:
        ended.append((ok, reason))

    assert REPAIRS["at-once"](None, {}, {}, answer) is None  # type: ignore[arg-type]  # needs no loop
    assert ended == [(True, "done")]


def test_lint_checks_the_samples() -> None:
    """mypy reads this folder in strict mode and reports unused `type: ignore` comments, on which `rejected.py` relies."""
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert mypy["strict"] is True
    assert "tests/typing" in mypy["files"]
