"""What users can request of roll-outs: show, promote, pause, resume, abort, retry and undo them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from nomad_watchdog.controllers import rollout_words
from nomad_watchdog.controllers.rollout import RolloutController
from nomad_watchdog.controllers.rollout_events import CHANGED, report, report_given_up
from nomad_watchdog.controllers.rollout_state import PastRollout, RolloutState
from nomad_watchdog.core import rollout_progress
from nomad_watchdog.core.rollout_progress import RolloutProgress
from nomad_watchdog.errors import NotFoundError, PreconditionError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentSpec, WallTime

ABORTED_BY: Final = "aborted by"


class RolloutRequests:
    """The requests to one `RolloutController`."""

    def __init__(
        self,
        fleet: Fleet,
        controller: RolloutController,
        changes: Callable[[str, str], str],
        changed: Callable[[], None],
    ) -> None:
        """`changes`: as of `core.goals.Goals`. `changed`: called when another spec may be in force."""
        self._fleet = fleet
        self._controller = controller
        self._changes = changes
        self._changed = changed
        fleet.views.add_status(self.status)

    # -- show -----------------------------------------------------------------------------------

    def status(self) -> dict[str, object]:
        """For the status: roll-outs that are not complete; empty where new versions need no proof."""
        if not self._controller.on:
            return {}
        return {
            "rollouts": {
                str(one["class"]): one | {"wished": one["version"]} for one in self.unfinished()
            }
        }

    def unfinished(self) -> list[dict[str, object]]:
        """The roll-outs that are not complete, by class."""
        controller = self._controller
        return [
            self.item(name)
            for name in sorted(controller.configured)
            if rollout_words.standing(controller, name, self._fleet).state != "complete"
        ]

    async def view(self) -> dict[str, object]:
        """The roll-outs of all classes. Raises as `RolloutController.read`."""
        if self._controller.on:
            await self._controller.read()
        names = sorted(self._controller.configured)
        return {
            "items": [self.item(name) for name in names],
            "problem": self._controller.problem,
        }

    def item(self, name: str) -> dict[str, object]:
        """The roll-out of one class. Raises NotFoundError for an unknown class."""
        controller, spec = self._controller, self._spec(name)
        state, staged = controller.state(name), controller.staged(name)
        soak, numbers = controller.soak(name), rollout_words.counts(self._fleet, spec)
        now = rollout_words.standing(controller, name, self._fleet)
        found: dict[str, object] = {
            "class": name,
            "version": spec.version,
            "spec": spec.spec_hash,
            "proven": state.good.version if state.good is not None else "",
            "in_force": controller.specs()[name].version,
            "devices": numbers.devices,
            "on_version": numbers.on_version,
            "ok": numbers.ok,
            "waiting": numbers.devices - numbers.on_version,
            "ready": staged.observed.ready if staged is not None else 0,
            "soaking": soak.soaking() if soak is not None else 0,
            "died": len(soak.died) if soak is not None else 0,
            "bad": 0,
            "failed": len(soak.died) if soak is not None else 0,
            "given_up": state.why if controller.is_given_up(name) else "",
            "step": "",
            "number": 0,
            "steps": 0,
            "paused_by": "",
            "change": self._change(state, spec),
            "state": now.state,
            "reason": now.reason,
            "next": now.next,
        }
        if staged is not None:
            found |= rollout_words.step_fields(staged, controller.progress(name))
            found["failed"] = staged.observed.bad + staged.observed.died
        return found

    def of_device(self, slug: Slug) -> str:
        """As `rollout_words.of_device`; "" for an unknown device."""
        record = self._fleet.records.get(slug)
        if record is None:
            return ""
        return rollout_words.of_device(self._controller, self._fleet, record)

    def history(self, name: str) -> dict[str, object]:
        """Roll-outs that are over, the newest last. Raises NotFoundError."""
        self._spec(name)
        past = self._controller.state(name).past
        return {
            "items": [
                {
                    "version": one.version,
                    "spec": one.spec,
                    "outcome": one.outcome,
                    "at": one.at,
                    "why": one.why,
                    "by": one.by,
                }
                for one in past
            ]
        }

    # -- change ---------------------------------------------------------------------------------

    async def control(self, name: str, what: str, by: str) -> dict[str, object]:
        """`promote`, `promote-all`, `pause`, `resume`, `abort`, `retry` or `undo`; durable when it returns.

        Raises NotFoundError for an unknown class, PreconditionError when the state of the roll-out does not allow
        it."""
        spec = self._spec(name)
        controller = self._controller
        await controller.read()
        before = controller.state(name)
        changed = await controller.document(name).update(
            lambda state: self._controlled(name, spec, state, what, by)
        )
        await controller.apply()
        if changed:
            self._report(name, spec, before, what, by)
            self._changed()
        return self.item(name)

    def _controlled(
        self, name: str, spec: AgentSpec, state: RolloutState, what: str, by: str
    ) -> RolloutState:
        match what:
            case "abort":
                return self._aborted(name, spec, state, by)
            case "undo":
                return self._undone(name, spec, state, by)
            case "retry":
                if state.bad != spec.spec_hash:
                    raise PreconditionError(f"version {spec.version} was not given up")
                return replace(state, bad="", why="", keeps=False)
            case _:
                progress = self._progress(name, spec, state)
                return replace(state, progress=self._moved(name, progress, what, by))

    def _progress(self, name: str, spec: AgentSpec, state: RolloutState) -> RolloutProgress:
        progress = state.progress
        if self._controller.staged(name) is None:
            raise PreconditionError(f"class {name} has no roll-out in steps in progress")
        if state.bad == spec.spec_hash:
            raise PreconditionError(
                f"version {spec.version} was given up: {state.why}; see `retry`"
            )
        if progress is None or progress.spec != spec.spec_hash:
            raise PreconditionError(
                f"the roll-out of version {spec.version} has not begun yet; try again in some seconds"
            )
        return progress

    def _moved(self, name: str, progress: RolloutProgress, what: str, by: str) -> RolloutProgress:
        staged = self._controller.staged(name)
        assert staged is not None
        strategy, last = staged.strategy, len(staged.strategy.steps) - 1
        match what:
            case "pause":
                return replace(progress, paused_by=progress.paused_by or by)
            case "resume":
                if not progress.paused_by:
                    raise PreconditionError(f"the roll-out of class {name} is not paused")
                return replace(progress, paused_by="")
            case "promote-all":
                at_last = replace(progress, step=last, group=None, soaked_s=0.0, promoted=True)
            case _:
                if progress.paused_by == rollout_progress.DEFERRED:
                    return replace(progress, paused_by="")
                groups = staged.turns.groups
                if progress.step >= last and not rollout_progress.next_group(progress, groups):
                    return replace(progress, promoted=True, paused_by="")
                at_last = rollout_progress.promoted(strategy, progress, groups)
        # The devices of the next step were not looked at: a later leader judges only those that it sees before.
        return replace(at_last, since=self._now(), unwell=(), crowded=True, paused_by="")

    def _aborted(
        self, name: str, spec: AgentSpec, state: RolloutState, by: str, *, undo: bool = False
    ) -> RolloutState:
        if state.bad == spec.spec_hash:
            raise PreconditionError(f"version {spec.version} was given up already: {state.why}")
        if not self._in_progress(name, spec, state):
            raise PreconditionError(
                f"class {name} has no roll-out in progress; `undo` returns to the version before"
            )
        why = f"{ABORTED_BY} {by}"
        past = PastRollout(spec.version, spec.spec_hash, "aborted", self._now(), why, by)
        keeps = not undo and not self._controller.strategy(name).back
        return replace(state, bad=spec.spec_hash, why=why, keeps=keeps).remembering(past)

    def _undone(self, name: str, spec: AgentSpec, state: RolloutState, by: str) -> RolloutState:
        if state.bad == spec.spec_hash and state.keeps:
            why = f"undone by {by}"
            past = PastRollout(spec.version, spec.spec_hash, "undone", self._now(), why, by)
            return replace(state, why=why, keeps=False).remembering(past)
        if self._in_progress(name, spec, state):
            return self._aborted(name, spec, state, by, undo=True)
        if state.bad == spec.spec_hash:
            raise PreconditionError(f"version {spec.version} was given up already: {state.why}")
        if state.before is None:
            raise PreconditionError(
                f"no version before {spec.version} is known for class {name}; configure it"
            )
        why = f"undone by {by}"
        past = PastRollout(spec.version, spec.spec_hash, "undone", self._now(), why, by)
        return state.undone(spec, why).remembering(past)

    def _in_progress(self, name: str, spec: AgentSpec, state: RolloutState) -> bool:
        """Whether a version is on trial that another one was proven before."""
        return (
            self._controller.on
            and state.good is not None
            and state.good.spec_hash != spec.spec_hash
            and name in self._controller.configured
        )

    def _report(self, name: str, spec: AgentSpec, before: RolloutState, what: str, by: str) -> None:
        controller = self._controller
        if what in ("abort", "undo"):
            back, state = controller.specs()[name], controller.state(name)
            report_given_up(self._fleet, spec, back, state.why, keep=state.keeps)
            return
        where = ""
        if before.progress is not None and (staged := controller.staged(name)) is not None:
            where = rollout_progress.in_words(
                staged.strategy, controller.progress(name), staged.turns
            )
        text = f"version {spec.version}: {what} by {by}" + (f"; now {where}" if where else "")
        report(self._fleet, name, CHANGED, text)

    # -- parts ----------------------------------------------------------------------------------

    def _now(self) -> WallTime:
        return self._fleet.clock.wall()

    def _spec(self, name: str) -> AgentSpec:
        found = self._controller.configured.get(name)
        if found is None:
            known = ", ".join(sorted(self._controller.configured))
            raise NotFoundError(f"there is no agent class {ascii(name)[:40]}; known: {known}")
        return found

    def _change(self, state: RolloutState, spec: AgentSpec) -> str:
        """What the configured spec changes in the proven one, in words; "" = nothing, or not known."""
        if state.good is None or state.good.spec_hash == spec.spec_hash:
            return ""
        return self._changes(spec.agent_class, state.good.spec_hash)
