"""Roll-outs in words: their state and what happens next, and what a device waits for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nomad_watchdog.controllers.rollout import RolloutController
from nomad_watchdog.controllers.rollout_judge import DEFERRAL
from nomad_watchdog.controllers.staged_rollout import StagedRollout
from nomad_watchdog.core import allowed_times, rollout_progress
from nomad_watchdog.core.goals import Changes
from nomad_watchdog.core.rollout import window
from nomad_watchdog.core.rollout_progress import RolloutProgress
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, PlacementState, Presence, VerdictState

COMMAND = "nomad-watchdog rollouts"
UNKNOWN = "until it is known which versions were given up"


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a roll-out stands."""

    state: str
    """complete, running, soaking, waiting, paused, halted or aborted."""
    reason: str = ""
    next: str = ""
    """What happens next, or what it waits for."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of devices of a class."""

    devices: int = 0
    on_version: int = 0
    """With an agent of the configured spec."""
    ok: int = 0
    """Of these: watched."""


def counts(fleet: Fleet, spec: AgentSpec) -> Counts:
    """Of the class of a spec."""
    members = [
        slug
        for slug, record in fleet.records.items()
        if record.presence is Presence.PRESENT and record.device.agent_class == spec.agent_class
    ]
    has = [slug for slug in members if has_spec(fleet, slug, spec)]
    ok = sum(fleet.verdicts.last(slug)[0].state is VerdictState.WATCHED for slug in has)
    return Counts(len(members), len(has), ok)


def has_spec(fleet: Fleet, slug: Slug, spec: AgentSpec) -> bool:
    """Whether a device has an agent of this spec at its record's epoch, running or not."""
    return any(
        one.spec_hash == spec.spec_hash
        and one.epoch == fleet.records[slug].epoch
        and one.state is not PlacementState.DEAD
        for one in fleet.placements.get(slug, ())
    )


def standing(controller: RolloutController, name: str, fleet: Fleet) -> Standing:
    """Of the roll-out of a configured class."""
    staged, state = controller.staged(name), controller.state(name)
    if controller.is_given_up(name):
        keeps = name in controller.halted() or state.keeps
        then = f"nothing until another version is configured or `{COMMAND} retry {name}`"
        return Standing("halted" if keeps else "aborted", state.why, then)
    if name in controller.halted():
        return _halted(controller, name)
    if staged is not None:
        return _staged(staged, controller.progress(name), name, fleet)
    if is_on_trial(controller, name):
        return Standing(
            "running", "the version is on trial on all devices", "complete after rollout.soak"
        )
    return Standing("complete")


def is_on_trial(controller: RolloutController, name: str) -> bool:
    """Whether the configured version of a class still has to prove itself."""
    good = controller.state(name).good
    spec = controller.configured[name]
    return controller.on and (good is None or good.spec_hash != spec.spec_hash)


def _halted(controller: RolloutController, name: str) -> Standing:
    good = controller.state(name).good
    if controller.staged(name) is not None:
        return Standing(
            "waiting", "until its devices are known", "it begins when they are registered"
        )
    if not controller.strategy(name).steps or good is None:
        return Standing("waiting", UNKNOWN, "it continues when the registry has been read")
    why = (
        f"the template of version {good.version} is not known any more, so the others can't keep it"
    )
    return Standing(
        "halted",
        f"{why}: restore its file, or remove the steps of the class for this version",
        "nothing until then",
    )


def _staged(staged: StagedRollout, progress: RolloutProgress, name: str, fleet: Fleet) -> Standing:
    step = staged.strategy.steps[min(progress.step, len(staged.strategy.steps) - 1)]
    if progress.paused_by:
        resume = f"nothing until `{COMMAND} resume {name}`"
        return Standing("paused", _paused(progress), resume)
    if step.pause:
        promote = f"nothing until `{COMMAND} promote {name}`"
        return Standing("paused", "a pause that waits for an operator", promote)
    if staged.refused:
        return Standing(
            "running",
            f"the scheduler can't be prepared for it: {staged.refused}",
            "given up after rollout.progress_deadline",
        )
    now = fleet.clock.wall()
    if not allowed_times.allowed(staged.strategy.allow, now):
        opens = allowed_times.begins_next(staged.strategy.allow, now)
        times = ", ".join(one.text for one in staged.strategy.allow)
        after = "" if opens is None else f" in {(opens - now) / 60:.0f} min"
        return Standing("waiting", f"outside of rollout.allow ({times})", f"continues{after}")
    return _going(staged, progress, fleet)


def _paused(progress: RolloutProgress) -> str:
    if progress.paused_by == rollout_progress.DEFERRED:
        return DEFERRAL
    return f"paused by {progress.paused_by}"


def _going(staged: StagedRollout, progress: RolloutProgress, fleet: Fleet) -> Standing:
    seen, groups = staged.observed, staged.turns.groups
    last = progress.step + 1 >= len(staged.strategy.steps)
    if following := rollout_progress.next_group(progress, groups):
        then = f"{staged.strategy.steps[progress.step].by}={following[0] or 'none'}"
    else:
        then = "it is complete" if last else f"step {progress.step + 2}"
    soak_s = staged.strategy.steps[progress.step].soak_s
    if rollout_progress.is_ready(staged.strategy, seen):
        left_s = max(0.0, soak_s - staged.soaked_s)
        query = f"; {seen.query_waits} (rollout.analysis)" if seen.query_waits else ""
        return Standing(
            "soaking",
            f"{seen.ready} of {seen.members} agents are ready; {left_s:.0f} s of soak are left{query}",
            (f"{then} in {left_s:.0f} s" if left_s else f"{then} now")
            + (", if the query is within its limits then" if query else ""),
        )
    unready, most = fleet.agents.unready(), window(len(fleet.records), fleet.limits)
    full = f"; {unready} devices have no ready agent now, {most} may" if unready >= most else ""
    return Standing(
        "running",
        f"{seen.ready} of {seen.members} agents of the step are ready{full}",
        f"{then} when all are ready" + (f" for {soak_s:.0f} s" if soak_s else ""),
    )


def step_fields(staged: StagedRollout, progress: RolloutProgress) -> Mapping[str, object]:
    """The step that has its turn, as JSON."""
    seen = staged.observed
    step = staged.strategy.steps[min(progress.step, len(staged.strategy.steps) - 1)]
    return {
        "step": rollout_progress.in_words(staged.strategy, progress, staged.turns),
        "number": progress.step + 1,
        "steps": len(staged.strategy.steps),
        "step_devices": seen.members,
        "tried": seen.tried,
        "died": seen.died,
        "bad": seen.bad,
        "soaked_s": round(staged.soaked_s, 1),
        "soak_s": step.soak_s,
        "paused_by": progress.paused_by,
        "began": progress.began,
        "since": progress.since,
    }


def of_device(controller: RolloutController, fleet: Fleet, record: DeviceRecord) -> str:
    """What the roll-out of its class means for a device, in one sentence; "" = nothing."""
    name = record.device.agent_class
    if record.presence is not Presence.PRESENT or name not in controller.configured:
        return ""
    if controller.is_given_up(name):
        return _of_given_up(controller, fleet, record)
    staged = controller.staged(name)
    if staged is None or not staged.is_known:
        if name not in controller.halted():
            return ""
        return f"no agent of class {name} is replaced: {_halted(controller, name).reason}"
    return _of_staged(controller, staged, fleet, record)


def _of_given_up(controller: RolloutController, fleet: Fleet, record: DeviceRecord) -> str:
    name = record.device.agent_class
    state, spec = controller.state(name), controller.configured[name]
    back = controller.specs()[name]
    if not has_spec(fleet, record.slug, spec):
        then = (
            f"the device keeps version {back.version} until another version is configured or "
            f"`{COMMAND} retry {name}`"
        )
    elif state.keeps:
        then = 'the agent keeps it (rollout.on_abort = "halt")'
    elif back is spec:
        then = "the agent keeps it, as the version before is not known any more"
    else:
        then = f"the agent goes back to version {back.version} as soon as the window has room"
    return f"version {spec.version} was given up ({state.why}): {then}"


def _of_staged(
    controller: RolloutController, staged: StagedRollout, fleet: Fleet, record: DeviceRecord
) -> str:
    name, slug = record.device.agent_class, record.slug
    spec, progress = staged.spec, controller.progress(name)
    total = len(staged.strategy.steps)
    where = rollout_progress.in_words(staged.strategy, progress, staged.turns)
    now = standing(controller, name, fleet)
    why = f"{now.reason}; {now.next}" if now.state in ("paused", "waiting") else now.reason
    so_far = f"{where}: {why}"
    proven = controller.specs()[name].version
    has_passed = slug in staged.turns.passed
    has_turn = has_passed or slug in staged.turns.current
    if has_turn and has_spec(fleet, slug, spec):
        trial = "" if has_passed else " on trial"
        return f"the agent runs version {spec.version}{trial} ({so_far})"
    if staged.has_died(slug):
        return (
            f"the agent with version {spec.version} ended too soon: the device has version {proven} "
            f"until {where} has passed"
        )
    if slug in staged.trials:
        return f"the device gets version {spec.version} as soon as the window has room ({so_far})"
    if has_turn:
        unheard = "until an agent has reported about it" if staged.going else why
        return f"the device waits for version {spec.version} in {where}: {unheard}"
    first = staged.first_step(slug)
    turn = f"step {first + 1} of {total}"
    if first == progress.step and (by := staged.strategy.steps[first].by):
        turn += f" reaches {by}={record.device.labels.get(by, '') or 'none'}"
    return (
        f"the device keeps version {proven} until {turn} of the roll-out of version {spec.version} "
        f"(now {so_far})"
    )


def announced(controller: RolloutController, changes: Changes) -> Iterator[dict[str, object]]:
    """The roll-outs in steps, for a plan. `changes`: as of `core.goals.Goals`."""
    for name, spec in sorted(controller.configured.items()):
        staged = controller.staged(name)
        if staged is None or controller.is_given_up(name):
            continue
        progress, proven = controller.progress(name), controller.specs()[name]
        where = rollout_progress.in_words(staged.strategy, progress, staged.turns)
        waits = ""
        if progress.paused_by:
            waits = f", {_paused(progress)}: `{COMMAND} resume {name}` begins it"
        what = changes(name, proven.spec_hash) or f"version {proven.version} → {spec.version}"
        yield {
            "class": name,
            "version": spec.version,
            "proven": proven.version,
            "paused_by": progress.paused_by,
            "text": f"class {name}: roll-out in steps, {where}{waits}; {what}",
        }
