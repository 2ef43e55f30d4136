"""The status of the fleet on one screen, and the four sentences that explain a device. Text only, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from nomad_watchdog.cli._answers import Fields
from nomad_watchdog.cli._fields import mapping, rollout_line
from nomad_watchdog.terminal import clean
from nomad_watchdog.units import age

WORST_FIRST: Final = ("offline", "failing", "unwatched", "degraded", "repairing", "suspect")
"""Verdicts that are listed device by device."""
MAX_DEVICES: Final = 8
MAX_NOTES: Final = 7
"""Lines about roll-outs and the control plane. With the first lines, the devices and a prompt they fit a terminal of 24 lines."""


def status_lines(answer: Mapping[str, object]) -> list[str]:
    """The state of the control plane and its fleet, without the devices: at most MAX_NOTES + 6 lines."""
    lines = [
        f"ready:    {'yes' if answer.get('ready') else 'no'}{_because(answer)}",
        f"devices:  {_number(answer, 'devices')}{_verdicts(answer)}",
        f"agents:   {_number(answer, 'placements')} on {_text(answer, 'backend') or 'no backend'}{_agents(answer)}",
        f"replica:  {_text(answer, 'replica')} holds {_text(answer, 'holds')}, version {_text(answer, 'version')}",
        f"on hold:  {'; '.join(_holds(answer)) or 'nothing'}",
        f"in work:  {', '.join(_work(answer)) or 'nothing'}",
    ]
    notes = [f"roll-out: {one}" for one in _rollouts(answer)]
    notes += [f"attention: {one}" for one in _notes(answer)]
    if len(notes) > MAX_NOTES:
        more = len(notes) - MAX_NOTES + 1
        notes[MAX_NOTES - 1 :] = [f"and {more} more lines, see `nomad-watchdog status -o wide`"]
    return [*lines, *notes]


def counted(answer: Mapping[str, object]) -> list[tuple[str, int]]:
    """The verdicts of devices with a problem, the worst first, and how many devices have each."""
    counts = mapping(answer.get("verdicts"))
    return [(name, n) for name in WORST_FIRST if (n := _number(counts, name)) > 0]


def device_lines(shown: Sequence[Fields], counts: Sequence[tuple[str, int]]) -> list[str]:
    """A line per device with a problem, and how to list the rest."""
    if not counts:
        return []
    widths = [max((len(_text(one, key)) for one in shown), default=0) for key in ("verdict", "id")]
    lines = [
        f"  {_text(one, 'verdict'):{widths[0]}}  {_text(one, 'id'):{widths[1]}}  "
        f"{age(one.get('since_s')):>4}  {_text(one, 'reason')}"
        for one in shown
    ]
    rest = sum(n for _, n in counts) - len(shown)
    if rest > 0:
        listed = " or ".join(name for name, _ in counts)
        lines.append(f"  and {rest} more: `nomad-watchdog devices ls --verdict` {listed}")
    return ["problems:", *lines]


def explained(answer: Mapping[str, object]) -> list[str]:
    """The first four lines of `explain`: verdict, since, why, next."""
    since = age(answer.get("since_s"))
    next_ = _sentence(_text(answer, "next"))
    wait = age(answer.get("next_in_s"))
    return [
        f"verdict: {_text(answer, 'id')} is {_text(answer, 'verdict')}.",
        f"since:   {f'{since} ago.' if since else 'not known.'}",
        f"why:     {_sentence(_text(answer, 'reason')) or 'no reason is known.'}",
        f"next:    {next_ or 'nothing.'}{f' In {wait}.' if wait else ''}",
    ]


def _sentence(text: str) -> str:
    """With its full stop. It may begin with a name, so its first letter stays as it is."""
    return text if not text or text.endswith((".", "!", "?", ":")) else f"{text}."


def _text(fields: Mapping[str, object], name: str) -> str:
    return clean(fields.get(name))


def _number(fields: Mapping[str, object], name: str) -> int:
    found = fields.get(name)
    return found if isinstance(found, int) else 0


def _because(answer: Mapping[str, object]) -> str:
    reason = _text(answer, "reason")
    return f": {reason}" if reason else ""


def _verdicts(answer: Mapping[str, object]) -> str:
    """The numbers of present devices by verdict, and of those that have left."""
    counts = mapping(answer.get("verdicts"))
    here = [name for name in counts if _number(counts, name) and name != "departed"]
    said = (
        f" ({', '.join(f'{_number(counts, name)} {clean(name)}' for name in here)})" if here else ""
    )
    left = _number(counts, "departed")
    return f"{said}, {left} departed" if left else said


def _agents(answer: Mapping[str, object]) -> str:
    unheard = mapping(answer.get("unheard"))
    odd = {
        "without reports": _number(unheard, "silent"),
        "with refused reports": _number(unheard, "refused"),
        "not listed by the scheduler": _number(answer, "unlisted"),
    }
    said = [f"{n} {what}" for what, n in odd.items() if n]
    return f" ({', '.join(said)})" if said else ""


def _holds(answer: Mapping[str, object]) -> Iterator[str]:
    """What waits for an operator's approval, with the command that approves it."""
    stops, departures = mapping(answer.get("breaker")), mapping(answer.get("departures"))
    if n := _number(stops, "held"):
        yield f"{n} stops of agents: {_text(stops, 'reason')}; {_text(stops, 'next')}"
    if n := _number(departures, "held"):
        confirm = f"nomad-watchdog departures confirm {_text(departures, 'id')}"
        yield f"{n} departures: {_text(departures, 'reason')}; {confirm}"


def _work(answer: Mapping[str, object]) -> Iterator[str]:
    open_ = mapping(answer.get("incidents"))
    numbers = (
        (_number(answer, "in_work"), "action{s} running"),
        (_number(answer, "queue"), "action{s} queued"),
        (_number(answer, "waiting_rollout"), "agent{s} waiting for a roll-out"),
        (_number(answer, "paused"), "device{s} paused"),
        (_number(answer, "flapping"), "device{s} flapping"),
        (_number(open_, "open"), "open incident{s}"),
    )
    yield from (f"{n} {what.format(s='' if n == 1 else 's')}" for n, what in numbers if n)


def _rollouts(answer: Mapping[str, object]) -> Iterator[str]:
    """Roll-outs that are not complete, and what each waits for."""
    for one in mapping(answer.get("rollouts")).values():
        yield clean(rollout_line(mapping(one)))


def _notes(answer: Mapping[str, object]) -> Iterator[str]:
    """What an operator must look at, in words."""
    config, classes = mapping(answer.get("config")), mapping(answer.get("classes_in_force"))
    events = mapping(answer.get("events"))
    plain = (
        ("configuration", _text(config, "problem")),
        ("classes", _text(classes, "problem")),
        ("leases", _text(answer, "leases")),
        ("pauses", _text(answer, "pauses_problem")),
        ("starts wait", _text(answer, "starts_held")),
        ("event store", _text(events, "reason")),
    )
    yield from (f"{what}: {text}" for what, text in plain if text)
    if waiting := _listed(config.get("needs_restart")):
        yield f"restart the service to apply {waiting}"
    if differing := _listed(classes.get("differs")):
        yield f"this replica's configuration is not in force for {differing}"
    for name, why in mapping(answer.get("unprepared_classes")).items():
        yield f"class {clean(name)} can't be prepared: {clean(why)}"
    yield from _places(answer)


def _places(answer: Mapping[str, object]) -> Iterator[str]:
    """The same about inventory files, nodes and the registry."""
    for file in _mappings(answer.get("inventory")):
        if problem := _text(file, "problem"):
            yield f"inventory {_text(file, 'file')}: {problem}"
    for node in _mappings(answer.get("closed_nodes")):
        waits = _text(node, "waits")
        there = f"node {_text(node, 'node')} is {_text(node, 'state')}, {_number(node, 'agents')} agents on it"
        yield f"{there}: {waits}" if waits else there
    relief = mapping(answer.get("relief"))
    for problem in (_text(relief, "waits"), _text(relief, "problem")):
        if problem:
            yield f"relief of {_listed(relief.get('overloaded')) or 'hosts'}: {problem}"
    if answer.get("registry_restored"):
        yield "the registry was restored from a backup, see `nomad-watchdog status -o wide`"


def _listed(value: object) -> str:
    return ", ".join(clean(one) for one in value) if isinstance(value, list) else ""


def _mappings(value: object) -> list[Mapping[str, object]]:
    return [mapping(one) for one in value] if isinstance(value, list) else []
