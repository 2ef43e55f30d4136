"""Planted bugs: one rule of the real code is removed, and a seed must show the promise broken."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest

Planted = tuple[Any, str, Any, Collection[str]]
"""Where the rule is, its name, its replacement, and the promises that it kept."""


def assert_found(
    planted: Planted,
    wrong: Callable[[int], Collection[str]],
    seeds: int,
    monkeypatch: pytest.MonkeyPatch,
    begin: int = 0,
) -> None:
    """At least one seed breaks at least one of the promises. `wrong`: the violations of a seed,
    each beginning with its promise. `begin`: the first seed to play, which showed the bug when this
    was written; then the later ones, then the earlier ones."""
    where, name, instead, promises = planted
    monkeypatch.setattr(where, name, instead)
    for seed in (*range(begin, seeds), *range(begin)):
        if {one.partition(":")[0] for one in wrong(seed)} & set(promises):
            return
    raise AssertionError(f"without {name} no seed below {seeds} shows any of {promises}")
