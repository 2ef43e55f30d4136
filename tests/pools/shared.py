"""Tests that apply to the pool drivers of all schedulers."""

from __future__ import annotations

import pytest

from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.errors import NotFoundError, TerminalError
from nomad_watchdog.pools import Driver


async def a_pool_of_another_is_left_alone(
    driver: Driver, other: Driver, pool: PoolSettings
) -> None:
    """`other`: the driver of another installation; closed at the end."""
    await other.ensure("p", pool)
    try:
        assert "p" not in await driver.list_pools()
        with pytest.raises(TerminalError, match="does not belong to this installation"):
            await driver.ensure("p", pool)
        with pytest.raises(NotFoundError):
            await driver.scale("p", 2, "")
        await driver.remove("p")
        assert "p" in await other.list_pools()
    finally:
        await other.remove("p")
        await other.close()
