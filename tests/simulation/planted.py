"""Bugs that are planted: one rule of the real code is taken out, and a seed must show what it kept."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest

Planted = tuple[Any, str, Any, Collection[str]]
"""Where, the name of what is taken out, what stands in its place, and the promises that it kept."""


def assert_found(
    planted: Planted,
    wrong: Callable[[int], Collection[str]],
    seeds: int,
    monkeypatch: pytest.MonkeyPatch,
    begin: int = 0,
) -> None:
    """One of the seeds shows one of the promises broken. `wrong`: what is broken in a seed, beginning with the promise.
    `begin`: the seed to play first, that showed it when this was written; the others follow, and then those below it."""
    where, name, instead, promises = planted
    monkeypatch.setattr(where, name, instead)
    for seed in (*range(begin, seeds), *range(begin)):
        if {one.partition(":")[0] for one in wrong(seed)} & set(promises):
            return
    raise AssertionError(f"without {name} no seed below {seeds} shows any of {promises}")
