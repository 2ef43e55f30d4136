"""Relief of overloaded hosts: reads the pressure, has `core.relief` decide, and asks the planner for the moves.

The leader decides for the whole fleet and stores its decisions in the registry. Every replica reads them, and its
planner moves the devices of its own shards. In a dry run nothing is stored or moved.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Final

from nomad_watchdog.controllers.relief_state import FORMAT
from nomad_watchdog.core import host_load, relief
from nomad_watchdog.core.actions import Move
from nomad_watchdog.core.host_load import Load, LoadTrack
from nomad_watchdog.core.moves import NONE_REQUESTED, MoveRequest, Requested
from nomad_watchdog.core.relief import (
    Candidate,
    Decision,
    Ended,
    ReliefMove,
    ReliefProgress,
    ReliefRules,
    ReliefState,
)
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import (
    DeviceRecord,
    Placement,
    PlacementState,
    Presence,
    VerdictState,
)
from nomad_watchdog.registry.document import Document
from nomad_watchdog.replicas.ownership import ShardOwnership

log = logging.getLogger(__name__)

POLL_S: Final = 5.0
NO_CALM_HOST: Final = "relief.no_calm_host"
CALM_HOST: Final = "relief.calm_host"
_MAX_SHOWN: Final = 50
"""Maximum number of overloaded hosts in the status; all are counted."""


class ReliefController:
    """Relief in one fleet. `wake`: have a pass of the planner made soon."""

    def __init__(
        self, fleet: Fleet, ownership: ShardOwnership, metrics: Metrics, wake: Callable[[], None]
    ) -> None:
        self._fleet, self._ownership, self._metrics, self._wake = fleet, ownership, metrics, wake
        self._rules: ReliefRules | None = None
        self._document = Document(fleet.registry, FORMAT)
        self._would = ReliefState()
        """State of a dry run."""
        self._tracks: dict[str, LoadTrack] = {}
        """Only of the leader: by host."""
        self._decision = Decision()
        self._waits: bool | None = None
        """Whether the last event states that no host is calm; None = not known yet."""
        self.problem = ""
        """Why the document can't be read or written now."""
        fleet.views.add_status(self.status)

    def configure(self, rules: ReliefRules | None) -> None:
        """Apply these rules from now on; None = no host is relieved."""
        if rules == self._rules:
            return
        self._rules, self._would = rules, ReliefState()
        self._reset()
        self._wake()

    def requested(self) -> Requested:
        """The placements that are to be left. A device that has become unhealthy since the decision stays."""
        rules = self._rules
        if rules is None or rules.dry_run:
            return NONE_REQUESTED
        return {
            move.slug: MoveRequest(Move.RELIEF, move.ref, move.reason, epoch=move.epoch)
            for move in self._document.value.moves
            if not move.withdrawn and self._is_healthy(move.slug)
        }

    def avoids(self, record: DeviceRecord) -> Collection[str]:
        """The host that the device's agent has left and should not return to now, if there is one."""
        rules = self._rules
        rest = self._document.value.devices.get(record.slug)
        if rules is None or rules.dry_run or rest is None:
            return ()
        return (rest.host,) if self._fleet.clock.wall() < rest.until else ()

    async def run(self) -> None:
        """Follow the pressure until cancelled."""
        while True:
            await self.poll()
            await asyncio.sleep(POLL_S)

    async def poll(self) -> None:
        """Read what was decided and, as the leader, decide."""
        rules = self._rules
        if rules is None:
            return
        try:
            if not rules.dry_run and await self._document.refresh():
                self._wake()
            if self._fleet.readiness.ready and self._ownership.may_lead():
                await self._lead(rules)
            else:
                self._reset()
        except WatchdogError as error:
            if not self.problem:
                log.warning("relief not decided", extra={"reason": str(error)})
            self.problem = str(error)
        else:
            self.problem = ""

    def _reset(self) -> None:
        self._tracks, self._decision, self._waits = {}, Decision(), None
        self._metrics.hosts.relief(0, {})

    # -- deciding --------------------------------------------------------------------------------

    async def _lead(self, rules: ReliefRules) -> None:
        self._observe(rules)
        now = self._fleet.clock.wall()
        before = self._would if rules.dry_run else self._document.value
        closed = self._fleet.hosts.closed
        sources = relief.sources(self._tracks, closed, rules)
        healthy = self._candidates(sources)
        state, ended = relief.settle(
            before, self._progress, lambda move: self._is_needed(move, sources), rules, now
        )
        state, failed = relief.judge(state, self._tracks, rules, now)
        state = relief.tidy(state, rules, now)
        decision = relief.decide(state, self._tracks, healthy, closed, rules, now)
        state = relief.begin(state, decision.moves, rules, now)
        if rules.dry_run:
            ended = ()
            self._would = ReliefState((), state.hosts, state.devices)
        elif state != before:
            if not await self._document.replace(state):
                return  # another replica wrote: decide again on what it wrote
            self._wake()
        self._decision = decision
        # Only later readings show whether a move helped; in a dry run it "ends" at once.
        of_ended = {move.host for move, _ in ended} if not rules.dry_run else set()
        for host in of_ended | {move.host for move in decision.moves}:
            self._tracks[host] = self._tracks.get(host, host_load.UNKNOWN).after_move()
        self._report(decision, ended, failed, state, rules)

    def _observe(self, rules: ReliefRules) -> None:
        """Take the newest readings; the load of a host without a fresh one is unknown."""
        fleet, now = self._fleet, self._fleet.clock.monotonic()
        tracks: dict[str, LoadTrack] = {}
        for host in fleet.pressures.hosts():
            before = self._tracks.get(host, host_load.UNKNOWN)
            found, used = fleet.pressures.reading(host), fleet.pressures.usage(host)
            if found is not None and found.pressure.is_known:
                if now - found.received_at <= rules.stale_s:
                    tracks[host] = host_load.observe(
                        before, found.pressure, found.received_at, rules.thresholds, rules.looks
                    )
            elif used is not None and rules.usage:
                tracks[host] = host_load.observe_usage(
                    before, used.usage, used.received_at, rules.usage, rules.looks
                )
        self._tracks = tracks

    def _candidates(self, hosts: Collection[str]) -> Mapping[str, list[Candidate]]:
        """The agents of healthy devices on these hosts."""
        found: dict[str, list[Candidate]] = {host: [] for host in hosts}
        if not hosts:
            return found
        wall = self._fleet.clock.wall()
        for slug, placements in self._fleet.placements.items():
            one = self._agent(slug, placements)
            if one is not None and one.node in found and self._is_healthy(slug):
                age_s = wall - one.created_at if one.created_at > 0 else None
                found[one.node].append(Candidate(slug, one.epoch, one.ref, age_s))
        return found

    def _agent(self, slug: Slug, placements: tuple[Placement, ...]) -> Placement | None:
        """The running placement of a present device at the registry's epoch."""
        record = self._fleet.records.get(slug)
        if record is None or record.presence is not Presence.PRESENT:
            return None
        running = (one for one in placements if one.state is PlacementState.RUNNING)
        return next((one for one in running if one.epoch == record.epoch), None)

    def _is_healthy(self, slug: Slug) -> bool:
        """Whether the device answers its agent, which is ready, and nothing else is done for it."""
        fleet = self._fleet
        return (
            slug in fleet.records
            and fleet.verdicts.last(slug)[0].state is VerdictState.WATCHED
            and fleet.agents.has_ready_agent(slug)
            and not fleet.presence.is_resting(slug)
        )

    def _is_needed(self, move: ReliefMove, sources: Collection[str]) -> bool:
        track = self._tracks.get(move.host)
        overloaded = move.host in sources or (track is not None and track.load is Load.OVERLOADED)
        return overloaded and self._is_healthy(move.slug)

    def _progress(self, move: ReliefMove) -> ReliefProgress:
        record = self._fleet.records.get(move.slug)
        if record is None or record.presence is not Presence.PRESENT:
            return ReliefProgress.DEPARTED
        if record.epoch <= move.epoch:
            return ReliefProgress.WAITING
        agent = self._agent(move.slug, self._fleet.placements.get(move.slug, ()))
        if agent is None or not self._fleet.agents.has_ready_agent(move.slug):
            return ReliefProgress.ON_WAY
        return ReliefProgress.RETURNED if agent.node == move.host else ReliefProgress.ARRIVED

    # -- what users see --------------------------------------------------------------------------

    def _report(
        self,
        decision: Decision,
        ended: tuple[Ended, ...],
        failed: tuple[str, ...],
        state: ReliefState,
        rules: ReliefRules,
    ) -> None:
        events, metrics = self._fleet.events, self._metrics.hosts
        kind = "relief.would_move" if rules.dry_run else "relief.moved"
        for move in decision.moves:
            events.note(move.slug, kind, f"{move.reason}; its agent leaves it", node=move.host)
            metrics.relief_moves("would_move" if rules.dry_run else "begun")
        for move, progress in ended:
            metrics.relief_moves(progress.value)
            if progress in (ReliefProgress.RETURNED, ReliefProgress.WITHDRAWN):
                events.note(
                    move.slug, f"relief.{progress.value}", _OUTCOMES[progress], node=move.host
                )
        for host in failed if not rules.dry_run else ():
            until_s = state.hosts[host].until - self._fleet.clock.wall()
            text = (
                f"host {host} is still overloaded after an agent has left it ({self._tracks[host].worst}); "
                f"the next one leaves in {until_s:.0f} s at the earliest"
            )
            events.note_fleet("relief.not_helped", text, {"node": host})
        self._report_waiting(decision)
        loads = Counter(track.load.value for track in self._tracks.values())
        metrics.relief(len(state.moves), loads, impossible=decision.no_calm_host)

    def _report_waiting(self, decision: Decision) -> None:
        """Publish once that no host is calm, and once that this has ended."""
        if self._waits is None:
            # What an earlier run or another leader has published, so that nothing is published twice.
            kinds = [one.kind for one in self._fleet.events.all.recent()]
            last = [kind for kind in kinds if kind in (NO_CALM_HOST, CALM_HOST)]
            self._waits = last[-1:] == [NO_CALM_HOST]
        if decision.no_calm_host is self._waits:
            return
        self._waits = decision.no_calm_host
        hosts = ", ".join(decision.overloaded[:_MAX_SHOWN])
        if decision.no_calm_host:
            text = f"overloaded hosts ({hosts}) are not relieved: no other host is calm"
            self._fleet.events.note_fleet(NO_CALM_HOST, text)
        else:
            text = (
                "a host is calm again" if decision.overloaded else "no host is overloaded any more"
            )
            self._fleet.events.note_fleet(CALM_HOST, text)

    def status(self) -> dict[str, object]:
        """For the status, where relief is configured."""
        rules = self._rules
        if rules is None:
            return {}
        loads = Counter(track.load for track in self._tracks.values())
        state = self._would if rules.dry_run else self._document.value
        fields: dict[str, object] = {
            "dry_run": rules.dry_run,
            "overloaded": list(self._decision.overloaded[:_MAX_SHOWN]),
            "calm": loads[Load.CALM],
            "moving": len(state.moves),
            "waits": "no other host is calm" if self._decision.no_calm_host else "",
        }
        return {"relief": fields | ({"problem": self.problem} if self.problem else {})}


_OUTCOMES: Final = {
    ReliefProgress.RETURNED: "the scheduler has placed the new agent on the host that it left",
    ReliefProgress.WITHDRAWN: "its agent stays: the move did not begin in time, or is needed no more",
}
