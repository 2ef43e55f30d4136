"""Checks the rules of roll-outs in steps (docs/rollouts.md) while a simulation runs: by what the
scheduler starts and what the registry stores.

R1: an agent starts with a spec that is not proven only for a device of a step that was admitted,
and, until that step has passed, only in place of an agent that was stopped for it.
R2: nothing starts with a spec that was given up.
R3: planned moves leave no more devices without a ready agent than the window permits.
R4: the state of a roll-out is never lost.
R5: a step does not pass before its agents were ready for the soak.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from nomad_watchdog.controllers.rollout_state import RolloutState, document_format
from nomad_watchdog.core import rollout_steps
from nomad_watchdog.core.rollout_progress import RolloutProgress
from nomad_watchdog.core.rollout_steps import Member, RolloutTurns, Strategy
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Limits, Presence
from tests.simulation.auditor import Auditor
from tests.simulation.cluster import Cluster, Job, Process
from tests.simulation.fakes import Store
from tests.simulation.simulator import SPEC

FORMAT: Final = document_format(SPEC.agent_class)
APPLIES_S: Final = 0.1
"""Time from the end of a read of the document until it is applied."""
DEAF_S: Final = 60.0
"""A replica that has not read the document for this time starts nothing with a spec that was given up meanwhile."""
POLL_S: Final = 2.0
"""Maximum difference between the soak as measured here and as measured by a replica that polls once per second."""
TENTH: Final = 10
"""One of this number of agents may be late when a step passes."""


class RolloutAuditor(Auditor):
    """`window`: maximum number of planned moves in progress. `single`: at most one replica is the leader at a time."""

    def __init__(
        self,
        store: Store,
        cluster: Cluster,
        limits: Limits,
        strategy: Strategy,
        *,
        window: int,
        single: bool,
    ) -> None:
        super().__init__(store, cluster, limits)
        self.state = RolloutState()
        self.given_up_at: dict[str, float] = {}
        """Hash of a spec → when it was last given up, even if it was tried again since."""
        self.sent_at = 0.0
        """When the request that arrives now was sent."""
        self._strategy, self._window, self._single = strategy, window, single
        self._proven: set[str] = set()
        self._first_proven_at: float | None = None
        self._turns = RolloutTurns()
        self._included: dict[str, set[Slug]] = defaultdict(set)
        """Hash of a spec → devices of the steps that were admitted for it."""
        self._passed: dict[str, set[Slug]] = defaultdict(set)
        self._at_last: set[str] = set()
        """Specs that have come to their last step."""
        self._configured = ""
        self._step_began = 0.0
        self._ended: set[Slug] = set()
        """Devices of the step of which an agent has ended by itself since the step began."""
        self._ran: set[tuple[Slug, Epoch]] = set()
        """Placements that have had a process."""
        self._read: dict[str, tuple[float, float]] = {}
        """Replica → when its last read of the document began and ended."""
        self._stops: dict[tuple[Slug, Epoch], float] = {}
        """When a replica requested the stop of a placement."""
        self._came_at: dict[Slug, float] = {}
        self._gone_at: dict[Slug, float] = {}
        self._ready_at: dict[int, float] = {}
        """By pid: since when the agent has reported that it is ready."""
        self._moving: set[Slug] = set()
        store.on_document = self._stored

    # -- what is requested ----------------------------------------------------------------------

    def configured(self, spec: AgentSpec) -> None:
        """A spec is configured; it is at its first step until the registry says otherwise."""
        self._configured = spec.spec_hash
        self._note_turns()

    # -- what happens ---------------------------------------------------------------------------

    def read(self, replica: str, began: float) -> None:
        """A replica has read the document."""
        self._read[replica] = began, self.now()

    def stop_sent(self, slug: Slug, epoch: Epoch) -> None:
        """A replica requests the stop of a placement."""
        self._stops[slug, epoch] = self.now()

    def reported(self, process: Process, *, ready: bool) -> None:
        """A report was accepted."""
        if not ready:
            self._ready_at.pop(process.pid, None)
            return
        self._ready_at.setdefault(process.pid, self.now())
        record = self.store.record(process.slug)
        if record is not None and (record.epoch, record.instance) == (
            process.epoch,
            process.instance,
        ):
            self._moving.discard(process.slug)

    def process_began(self, process: Process) -> None:
        super().process_began(process)
        if (process.slug, process.epoch) in self._ran:
            self._ended.add(process.slug)
        self._ran.add((process.slug, process.epoch))

    # -- the registry ---------------------------------------------------------------------------

    def _written(self, before: DeviceRecord | None, after: DeviceRecord) -> None:
        super()._written(before, after)
        if before is not None and before.condition != after.condition:
            self.actions -= 1  # knowledge about a device, not an action
        slug, present = after.slug, after.presence is Presence.PRESENT
        if before is None or before.presence is not after.presence:
            if not present:
                self._gone_at[slug] = self.now()
            elif self.now() - self._gone_at.get(slug, -POLL_S) >= POLL_S:
                self._came_at[slug] = self.now()  # else no poll has seen that it was away
            self._note_turns()
        if before is None or not present:
            self._moving.discard(slug)
        elif before.epoch != after.epoch and self._is_ready(before):
            self._moving.add(slug)
            if len(self._moving) > self._window:
                names = sorted(self.store.record(one).device.id for one in self._moving)  # type: ignore[union-attr]
                self.broken("R3", f"{names} are moved at a time, {self._window} may")

    def _is_ready(self, record: DeviceRecord) -> bool:
        return any(
            (one.epoch, one.instance) == (record.epoch, record.instance)
            and one.pid in self._ready_at
            and self.cluster.nodes[one.node]
            for one in self.cluster.alive(record.slug)
        )

    def _stored(self, name: str) -> None:
        if name != FORMAT.name:
            return
        before, self.state = self.state, FORMAT.decode(self.store.document(name).body)
        after, now = self.state, self.now()
        self.trace.say(f"roll-out: {_in_words(after)}")
        if after.good is not None:
            self._proven.add(after.good.spec_hash)
            if self._first_proven_at is None:
                self._first_proven_at = now
        if after.bad and (after.bad, after.why) != (before.bad, before.why):
            self.given_up_at[after.bad] = now
        self._check_progress(before, after)
        if _place(before.progress) != _place(after.progress):
            self._step_began = now
            self._ended.clear()
        self._note_turns()

    def _note_turns(self) -> None:
        """Which devices have their turn now, and which had it, by the registry's records."""
        progress, steps = self.state.progress, self._strategy.steps
        records = [self.store.record(slug) for slug in self.store.rows]
        members = [
            Member(one.slug, one.device.labels)
            for one in records
            if one is not None and one.presence is Presence.PRESENT
        ]
        first = rollout_steps.turns(steps, 0, None, members)
        self._included[self._configured] |= first.current
        if progress is None:
            return
        self._turns = rollout_steps.turns(steps, progress.step, progress.group, members)
        self._passed[progress.spec] |= self._turns.passed
        self._included[progress.spec] |= self._turns.passed | self._turns.current
        if progress.step >= len(steps) - 1:
            self._at_last.add(progress.spec)

    def _check_progress(self, before: RolloutState, after: RolloutState) -> None:
        old, new = before.progress, after.progress
        if old is None:
            return
        proven = after.good is not None and after.good.spec_hash == old.spec
        if new is not None and new.spec == old.spec:
            if self._single and (new.step < old.step or new.began != old.began):
                self.broken(
                    "R4", f"version {old.version} was at {_place(old)}, is at {_place(new)}"
                )
            if (new.step, new.group) != (old.step, old.group) and not new.crowded:
                self._check_passed(old)
        elif proven:
            self._check_passed(old)
            if old.step < len(self._strategy.steps) - 1:
                self.broken("R5", f"version {old.version} is proven at step {old.step + 1}")

    def _check_passed(self, at: RolloutProgress) -> None:
        """Check a step that has passed, and was not promoted."""
        step, now = self._strategy.steps[at.step], self.now()
        if at.promoted:
            return
        if step.pause:
            self.broken("R5", f"step {at.step + 1} of version {at.version} is a pause, and passed")
        if not self._single or not self._turns.current:
            return  # each of several leaders measures the soak; without devices there is none
        if all(map(self._is_lost, self._turns.current)):
            return  # a step passes without devices that are out of reach
        if now - self._step_began < step.soak_s - POLL_S:
            took_s = now - self._step_began
            self.broken("R5", f"step {at.step + 1} of version {at.version} took {took_s:.1f} s")
        young = [
            process.device_id
            for slug in sorted(self._turns.current - self._ended)
            for process in self.cluster.alive(slug)
            if process.spec.spec_hash == at.spec
            and self.cluster.nodes[process.node]
            and now - self._ready_at.get(process.pid, now) < step.soak_s - POLL_S
        ]
        if len(young) > len(self._turns.current) // TENTH:
            self.broken("R5", f"step {at.step + 1} of version {at.version} passed without {young}")

    def _is_lost(self, slug: Slug) -> bool:
        """Whether an agent of a device is on a node that does not answer."""
        return any(not self.cluster.nodes[one.node] for one in self.cluster.alive(slug))

    # -- the scheduler --------------------------------------------------------------------------

    def _started(self, job: Job) -> None:
        super()._started(job)
        spec_hash = job.spec.spec_hash
        if spec_hash == self.state.bad:
            self._check_given_up(job)
        elif spec_hash not in self._proven and self._expects_steps():
            self._check_unproven(job)

    def _expects_steps(self) -> bool:
        """Whether each replica knows that there is a proven spec."""
        first = self._first_proven_at
        return first is not None and (first == 0.0 or self.sent_at > first + DEAF_S)

    def _check_given_up(self, job: Job) -> None:
        since, sent_at = self.given_up_at[job.spec.spec_hash], self.sent_at
        began, ended = self._read.get(job.owner, (0.0, 0.0))
        knew = began >= since and sent_at > ended + APPLIES_S
        if knew or sent_at - since > DEAF_S:
            self.broken(
                "R2",
                f"{job.owner} starts {job.device_id} with version {job.spec.version}, "
                f"{sent_at - since:.1f} s after it was given up",
            )

    def _check_unproven(self, job: Job) -> None:
        spec_hash, slug = job.spec.spec_hash, job.slug
        what = f"{job.owner} starts {job.device_id} with version {job.spec.version}"
        if slug not in self._included[spec_hash]:
            self.broken("R1", f"{what}, and no step includes it")
        elif slug in self._passed[spec_hash] or spec_hash in self._at_last:
            return
        elif not self._left_on_request(job):
            self.broken("R1", f"{what}, and nothing was stopped for it")

    def _left_on_request(self, job: Job) -> bool:
        """Whether the agent before this one was stopped on request, since the device was registered. Unknown if an
        operator has purged one."""
        if job.slug in self._purged_at:
            return True
        before = [
            one.epoch
            for one in self.cluster.jobs.values()
            if one.slug == job.slug and one.epoch < job.epoch
        ]
        stopped_at = self._stops.get((job.slug, max(before, default=Epoch(0))))
        return stopped_at is not None and stopped_at >= self._came_at[job.slug]


def _place(progress: RolloutProgress | None) -> tuple[str, int, str | None] | None:
    return None if progress is None else (progress.spec, progress.step, progress.group)


def _in_words(state: RolloutState) -> str:
    good = state.good.version if state.good is not None else "-"
    parts = [f"proven {good}"]
    if (at := state.progress) is not None:
        group = f" ({at.group})" if at.group is not None else ""
        parts.append(f"version {at.version} at step {at.step + 1}{group}, soaked {at.soaked_s:.1f}")
        parts += [f"paused by {at.paused_by}"] if at.paused_by else []
        parts += ["promoted"] if at.promoted else []
    if state.bad:
        parts.append(f"{state.bad} given up: {state.why}")
    return "; ".join(parts)
