"""What requests cost: the processor time of each token's requests, measured, and limited by a budget per token.

A request costs the time that its steps take on the event loop, and what others do for it and report by
`core.meter.charge`. It is charged as it runs, so that the next request of the same token finds the budget as
it is. The reads of one viewer token run one after another: a burst of them takes one turn of the loop at a time.
"""

from __future__ import annotations

import math
import time
import types
from asyncio import Lock
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Final, TypeVar

from aiohttp import web

from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.api.routing import Handler
from nomad_watchdog.clock import Clock
from nomad_watchdog.core import request_meter
from nomad_watchdog.core.rate_limit import Buckets
from nomad_watchdog.core.roles import Role

LARGE_TIMES: Final = 5.0
"""The budget of an operator's token and of a device token, as a multiple of a viewer's."""
MAX_TURNS: Final = 1_024
"""Maximum number of tokens whose reads run one after another."""
_READS: Final = frozenset({"GET", "HEAD"})
_T = TypeVar("_T")


class CostLimits:
    """Budgets: `share` of one processor core over time, `burst` seconds at once.

    Reads by viewers and operators are charged, and all requests with a device token or with the credential of one
    agent. Changes by operators are not charged. A token that all agents share has no budget."""

    def __init__(self, share: float, burst: float) -> None:
        self.share, self.burst = share, burst
        self.spent_s = 0.0
        """CPU seconds of all tokens since the start."""
        self._small = Buckets(share, burst)
        self._large = Buckets(LARGE_TIMES * share, LARGE_TIMES * burst)
        self._turns: OrderedDict[str, Lock] = OrderedDict()

    def changed(self, new: CostLimits | None) -> CostLimits | None:
        """The budgets after a reload: these if their settings are the same, else the new ones."""
        same = new is not None and (new.share, new.burst) == (self.share, self.burst)
        return self if same else new

    async def answer(
        self,
        request: web.Request,
        handler: Handler,
        client: str,
        role: Role,
        clock: Clock,
        *,
        of_one_agent: bool = False,
    ) -> web.StreamResponse:
        """Handle a request and charge it. Raises RequestError (429) if the budget is used up."""
        budgets = self._budgets(request, role, of_one_agent=of_one_agent)
        if budgets is None:
            return await handler(request)

        def spend(seconds: float) -> None:
            self.spent_s += seconds
            budgets.spend(client, seconds, clock.monotonic())

        if role is not Role.VIEWER or request.query.get("follow") in ("true", "1"):
            self._check(budgets, client, clock)
            return await _metered(handler(request), spend)
        async with self._turn(client):
            self._check(budgets, client, clock)
            return await _metered(handler(request), spend)

    def _budgets(self, request: web.Request, role: Role, *, of_one_agent: bool) -> Buckets | None:
        """The budgets of callers with this role; None = the request is not charged."""
        if role is Role.AGENT:
            return self._small if of_one_agent else None
        if role is Role.DEVICE:
            return self._large
        # A scrape costs little, and must not wait for other reads with the same token.
        if request.method not in _READS or request.path == "/metrics":
            return None
        replicates = role is Role.OPERATOR and request.query.get("marks") in ("true", "1")
        return (
            None if replicates else {Role.VIEWER: self._small, Role.OPERATOR: self._large}.get(role)
        )

    def _check(self, budgets: Buckets, client: str, clock: Clock) -> None:
        wait_s = budgets.owes(client, clock.monotonic())
        if wait_s:
            raise RequestError(
                429,
                "requests_cost_too_much",
                f"the requests of this token took more than {budgets.rate:.0%} of a processor core "
                f"(api.read_share); ask again in {wait_s:.0f} s, or for less at a time",
                {"Retry-After": str(max(1, math.ceil(wait_s)))},
            )

    def _turn(self, client: str) -> Lock:
        turn = self._turns.setdefault(client, Lock())
        self._turns.move_to_end(client)
        if len(self._turns) > MAX_TURNS:
            self._turns.popitem(last=False)
        return turn


@types.coroutine
def _metered(work: Awaitable[_T], spend: Callable[[float], None]) -> Generator[object, object, _T]:
    """Await `work`, and charge each of its steps when it ends."""
    steps = work.__await__()
    resume: Callable[[], object] = partial(steps.send, None)
    while True:
        began, token = time.thread_time(), request_meter.SPEND.set(spend)
        try:
            waits_for = resume()
        except StopIteration as end:
            value: _T = end.value
            return value
        finally:
            request_meter.SPEND.reset(token)
            spend(time.thread_time() - began)
        try:
            resume = partial(steps.send, (yield waits_for))
        except BaseException as error:  # noqa: BLE001  # the coroutine handles it
            resume = partial(steps.throw, error)
