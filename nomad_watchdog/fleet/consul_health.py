"""What Consul says about the agents' health: evidence, never existence.

An agent that Consul does not show may well run: four ways are known to get 200 and an empty list from
a Consul whose agents are all there. So a view from here raises suspicion; the scheduler is then asked.

One watch serves the whole process, and it asks only for checks that do not pass: 6 ms at 10,000
instances against 1.6 s for the full list, which is read at the start, after a gap, when something
changed that the watch does not show, and every 30 s to 5 min by what it costs. A thousand watches by device would cost
one Consul agent gigabytes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from watchdog_agent.runtime.parsing import whole
from watchdog_agent.wire import SERVICE

from nomad_watchdog.clients.consul import ConsulClient
from nomad_watchdog.errors import TransientError
from nomad_watchdog.ids import Slug, is_slug
from nomad_watchdog.model import NEVER, Epoch, Health

log = logging.getLogger(__name__)

_NOT_PASSING: Final = 'Status != "passing"'
_WAIT_S: Final = 30.0
_MIN_GAP_S: Final = 0.25
_GAP_PER_COST: Final = 5.0
_UNSEEN_GAP_PER_COST: Final = 20.0
"""Full reads for changes that the watch does not show take at most a twentieth of the time."""
_UNSEEN_MIN_GAP_S: Final = 2.0
_FULL_MIN_S: Final = 30.0
_FULL_PER_COST: Final = 100.0
"""Without a reason a full read comes every 30 s, or more rarely when it takes long: 1 % of the time."""
_BACKOFF_MAX_S: Final = 15.0
_TARGETED: Final = 32
"""More changed instances than this at once: one full read is cheaper than their filter."""
_OUTPUT: Final = 200
_SEVERITY: Final = {"passing": 0, "warning": 1, "critical": 2}

_Failing = dict[tuple[str, str, str], str]
"""Node, service id, check id → status."""


@dataclass(frozen=True, slots=True)
class _Instance:
    slug: Slug
    health: Health


class ConsulHealth:
    """The health of all instances of one service, for one consumer."""

    def __init__(
        self, client: ConsulClient, service: str = SERVICE, *, full_every_s: float = 300.0
    ) -> None:
        self._client = client
        self._service = service
        self._full_every_s = full_every_s  # at most so long between full reads
        self._instances: tuple[_Instance, ...] = ()
        self._failing: _Failing = {}
        self._index = 0
        self._full_due = 0.0
        self._full_cost_s = 0.0
        self._gap_s = _MIN_GAP_S
        self._confirmed_at = float("-inf")

    @property
    def age_s(self) -> float:
        """Seconds since Consul last confirmed the view; infinite before the first time. While the
        watch is idle it grows to about 30 s by itself."""
        return time.monotonic() - self._confirmed_at

    async def watch(self) -> AsyncIterator[Mapping[Slug, Health]]:
        """The whole view at the start and after each change. Never ends.

        While Consul does not answer nothing is yielded: the last view stands and `age_s` grows.
        Raises DeniedError and TerminalError.
        """
        failures = 0
        while True:
            started = time.monotonic()
            try:
                changed = await self._step()
            except TransientError as error:
                failures += 1
                self._index = 0  # a gap: start over with a full read
                log.warning("consul health can't be read", extra={"reason": str(error)})
                ceiling = min(_BACKOFF_MAX_S, 0.5 * 2 ** min(failures, 10))
                await asyncio.sleep(random.uniform(_MIN_GAP_S, ceiling))  # noqa: S311
                continue
            failures = 0
            if changed:
                yield self._view()
            spare_s = self._gap_s - (time.monotonic() - started)
            if spare_s > 0:
                await asyncio.sleep(spare_s)

    async def _step(self) -> bool:
        """Wait for one answer and take it in; whether the view may have changed."""
        now = time.monotonic()
        if self._index == 0 or now >= self._full_due:
            await self._full()
            return True
        wait_s = max(0.05, min(_WAIT_S, self._full_due - now))
        index, rows = await self._checks(self._index, wait_s)
        if index < self._index:  # restored or replaced servers: nothing that we hold means anything
            self._index = 0
            return False
        moved, self._index = index != self._index, index
        failing = _failing(rows)
        if not failing and self._failing:  # the lie to expect is an empty answer: ask plainly
            _, rows = await self._checks(0, 0.0)
            failing = _failing(rows)
        self._confirmed_at = time.monotonic()
        if not moved:
            return False
        differing = {key[1] for key, _ in failing.items() ^ self._failing.items()}
        self._failing = failing
        if not differing:  # deregistered, registered anew while passing, or a node's own check
            gap_s = max(_UNSEEN_MIN_GAP_S, _UNSEEN_GAP_PER_COST * self._full_cost_s)
            self._full_due = min(self._full_due, time.monotonic() + gap_s)
            return False
        await self._refresh({Slug(service_id) for service_id in differing if is_slug(service_id)})
        return True

    async def _checks(self, index: int, wait_s: float) -> tuple[int, list[Any]]:
        return await self._client.health_checks(self._service, _NOT_PASSING, index, wait_s)

    async def _full(self) -> None:
        # the index first: what changes between the two reads ends the next wait at once
        index, rows = await self._checks(0, 0.0)
        started = time.monotonic()
        _, found = await self._client.health_service(self._service)
        if not found and self._instances:
            _, found = await self._client.health_service(self._service)
        self._full_cost_s = time.monotonic() - started
        self._instances = tuple(_parse(found))
        self._failing = _failing(rows)
        self._index = index
        self._confirmed_at = time.monotonic()
        every_s = max(_FULL_MIN_S, _FULL_PER_COST * self._full_cost_s)
        self._full_due = self._confirmed_at + min(self._full_every_s, every_s)

    async def _refresh(self, slugs: Collection[Slug]) -> None:
        """Read again the instances of these slugs, which are safe inside a filter (S11)."""
        if len(slugs) > _TARGETED:
            await self._full()
            return
        if not slugs:
            return
        expression = " or ".join(f'Service.ID == "{slug}"' for slug in sorted(slugs))
        started = time.monotonic()
        _, found = await self._client.health_service(self._service, expression)
        others = (kept for kept in self._instances if kept.slug not in slugs)
        self._instances = (*others, *_parse(found))
        self._gap_s = max(_MIN_GAP_S, _GAP_PER_COST * (time.monotonic() - started))

    def _view(self) -> Mapping[Slug, Health]:
        """One instance a slug: a service id is unique only within one Consul node, so a moved agent
        shows twice. The highest epoch is taken, and within one epoch the healthiest.

        A registration that changes nothing but its meta does not wake a watch on checks (tried on
        Consul 1.21): the next full read shows it."""
        best: dict[Slug, Health] = {}
        for instance in self._instances:
            held = best.get(instance.slug)
            if held is None or _rank(instance.health) > _rank(held):
                best[instance.slug] = instance.health
        return MappingProxyType(best)


def _rank(health: Health) -> tuple[int, int]:
    return health.epoch, -_SEVERITY[health.status]


def _failing(rows: Iterable[Any]) -> _Failing:
    return {
        (_text(row, "Node"), _text(row, "ServiceID"), _text(row, "CheckID")): _text(row, "Status")
        for row in rows
        if isinstance(row, dict)
    }


def _parse(rows: Iterable[Any]) -> Iterable[_Instance]:
    """Instances with a slug for an id. Anybody with the right to register can put anything here."""
    for row in rows:
        service, node = _part(row, "Service"), _part(row, "Node")
        slug = _text(service, "ID")
        if not is_slug(slug):
            log.warning(
                "service with a strange id ignored", extra={"service_id": ascii(slug)[:100]}
            )
            continue
        status, output = _worst(row.get("Checks"), slug)
        host = _text(service, "Address") or _text(node, "Address")
        port = service.get("Port")
        yield _Instance(
            slug=Slug(slug),
            health=Health(
                status=status,
                epoch=_epoch(_part(service, "Meta").get("epoch")),
                node=_text(node, "Node"),
                address=f"{host}:{port}" if isinstance(port, int) and port > 0 else host,
                output=output,
            ),
        )


def _worst(checks: object, slug: str) -> tuple[str, str]:
    """Worst status of the instance's checks and its node's, with the output that belongs to it."""
    worst, output, own = "passing", "", False
    for check in checks if isinstance(checks, list) else ():
        if not isinstance(check, dict):
            continue
        own = own or check.get("ServiceID") == slug
        status = _text(check, "Status")
        status = status if status in _SEVERITY else "critical"
        if (_SEVERITY[status], not output) > (_SEVERITY[worst], False):
            worst, output = status, _text(check, "Output")[:_OUTPUT]
    return (worst, output) if own else ("critical", "it has no check of its own")


def _epoch(value: object) -> Epoch:
    """The epoch in a service's meta; anything odd loses against every real one."""
    try:
        return Epoch(whole(value)) if isinstance(value, str) else NEVER
    except ValueError:
        return NEVER


def _part(row: object, name: str) -> dict[str, Any]:
    value = row.get(name) if isinstance(row, dict) else None
    return value if isinstance(value, dict) else {}


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""
