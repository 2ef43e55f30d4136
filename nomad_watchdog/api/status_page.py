"""The status page: counts, and the devices, those that need attention first. No script, everything escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Final

from aiohttp import web

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.pagination import check_query, scan
from nomad_watchdog.controllers.rollout_requests import RolloutRequests
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.host_view import HostRow
from nomad_watchdog.fleet.views import DeviceView
from nomad_watchdog.host_pressure import Resource
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Presence, VerdictState

MAX_ROWS: Final = 200
MAX_INCIDENTS: Final = 20
MAX_HOSTS: Final = 50
MAX_ROLLOUTS: Final = 50
RENDER_EVERY_S: Final = 1.0
"""Minimum interval between two renderings, each of which reads the whole fleet."""

_URGENCY: Final = {
    state: rank
    for rank, state in enumerate(
        (
            VerdictState.OFFLINE,
            VerdictState.FAILING,
            VerdictState.UNWATCHED,
            VerdictState.DEGRADED,
            VerdictState.REPAIRING,
            VerdictState.SUSPECT,
            VerdictState.STARTING,
            VerdictState.WATCHED,
            VerdictState.DEPARTED,
        )
    )
}

_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1b1f23;background:#fff}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #ccd1d6;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:1.5rem}dt{color:#57606a}dd{margin:0;font-size:1.5rem}
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}dt{color:#9198a1}}
"""
_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_CSP: Final = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


async def status_page(request: web.Request) -> web.StreamResponse:
    """Devices that need attention first; at most MAX_ROWS rows, the rest is counted."""
    check_query(request, set())
    context = request.app[CONTEXT]
    clock = context.fleet.clock
    async with context.page_lock:  # one rendering for all concurrent requests
        if clock.monotonic() - context.page[0] > RENDER_EVERY_S:
            text = await _rendered(context.fleet, context.rollouts)
            context.page = (clock.monotonic(), text)
    return web.Response(
        text=context.page[1],
        content_type="text/html",
        headers={"Content-Security-Policy": _CSP, "Referrer-Policy": "no-referrer"},
    )


async def _rendered(fleet: Fleet, rollouts: RolloutRequests | None = None) -> str:
    views = [view async for view in scan(fleet, lambda r: r.presence is Presence.PRESENT)]
    views.sort(key=lambda v: (_URGENCY[v.verdict.state], v.record.device.id))
    counts = dict.fromkeys(VerdictState, 0)
    for view in views:
        counts[view.verdict.state] += 1
    tiles = "".join(
        f"<div><dt>{state.value}</dt><dd>{counts[state]}</dd></div>"
        for state in VerdictState
        if state is not VerdictState.DEPARTED
    )
    rest = len(views) - MAX_ROWS
    more = f"<p>{rest} more devices are not listed here.</p>" if rest > 0 else ""
    empty = "" if views else "<p>No devices are registered.</p>"
    going = rollouts.unfinished() if rollouts is not None else []
    of_device = rollouts.of_device if rollouts is not None and going else None
    head = '<th scope="col">Roll-out</th>' if of_device is not None else ""
    ready = "ready" if fleet.readiness.ready else f"not ready: {escape(fleet.readiness.reason)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>nomad-watchdog</title>'
        f"<style>{_STYLE}</style></head><body><h1>nomad-watchdog</h1><p>{len(views)} devices, "
        f'{ready}</p><dl>{tiles}</dl>{_incidents(fleet)}{_rollouts(going)}<table><thead><tr><th scope="col">Device</th>'
        '<th scope="col">Verdict</th><th scope="col">Since</th><th scope="col">Reason</th>'
        f'<th scope="col">Address</th><th scope="col">Node</th>{head}</tr></thead><tbody>'
        f"{''.join(_row(view, of_device) for view in views[:MAX_ROWS])}</tbody></table>{empty}{more}{_hosts(fleet)}"
        "</body></html>"
    )


def _hosts(fleet: Fleet) -> str:
    """The hosts with the highest pressure first, then by name."""
    rows = fleet.hosts.rows()
    rows.sort(key=_highest, reverse=True)
    names = ("Host", "Agents", "State", *(f"{one.value} pressure" for one in Resource))
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    lines = "".join(map(_host_row, rows[:MAX_HOSTS]))
    rest = len(rows) - MAX_HOSTS
    more = f"<p>{rest} more hosts are not listed here.</p>" if rest > 0 else ""
    if not rows:
        return ""
    return (
        "<h2>Hosts</h2><p>Pressure: share of the last 10 and 60 seconds in which a task waited for the resource.</p>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>{more}"
    )


def _highest(row: HostRow) -> float:
    found = (row.pressure.of(one) for one in Resource) if row.pressure is not None else ()
    return max((one.avg60 for one in found if one is not None), default=-1.0)


def _host_row(row: HostRow) -> str:
    stalls = [None if row.pressure is None else row.pressure.of(one) for one in Resource]
    usage = {} if row.usage is None else row.usage.values()
    without = (f"{usage[one]:.1f} % used" if one in usage else "unknown" for one in Resource)
    texts = (
        used if one is None else f"{one.avg10:.1f} % {one.avg60:.1f} %"
        for one, used in zip(stalls, without, strict=True)
    )
    return _cells((row.name, str(row.agents), row.state, *texts))


def _incidents(fleet: Fleet) -> str:
    incidents = fleet.recorder.incidents
    opened = incidents.opened()
    lines = "".join(
        f"<li><b>{incident.kind.value} <bdi>{escape(incident.group)}</bdi></b>: {incident.count} of "
        f"{incident.size} devices, {incident.bad} unhealthy now ({escape(incident.id)})"
        f"{_no_agent(incidents.reason(incident))}</li>"
        for incident in opened[:MAX_INCIDENTS]
    )
    rest = len(opened) - MAX_INCIDENTS
    more = f"<p>{rest} more incidents are not listed here.</p>" if rest > 0 else ""
    return f"<h2>Incidents</h2><ul>{lines}</ul>{more}" if lines else ""


def _no_agent(reason: str) -> str:
    return f"; no agent runs: <bdi>{escape(reason)}</bdi>" if reason else ""


def _rollouts(going: Sequence[Mapping[str, object]]) -> str:
    """The roll-outs that are not complete, one line each."""
    names = ("Class", "Version", "State", "Step", "Ok", "Bad", "Waiting", "Reason", "Next")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    fields = ("class", "version", "state", "step", "ok", "failed", "waiting", "reason", "next")
    lines = "".join(_cells(str(one[name]) for name in fields) for one in going[:MAX_ROLLOUTS])
    rest = len(going) - MAX_ROLLOUTS
    more = f"<p>{rest} more roll-outs are not listed here.</p>" if rest > 0 else ""
    if not going:
        return ""
    return (
        "<h2>Roll-outs</h2><p>Ok: devices watched by an agent of the version. Bad: devices that were well before, and "
        "agents that ended too soon. Waiting: devices that do not have the version.</p>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>{more}"
    )


def _row(view: DeviceView, of_device: Callable[[Slug], str] | None) -> str:
    node = view.placement.node if view.placement is not None else ""
    rollout = () if of_device is None else (of_device(view.record.slug),)
    return _cells(
        (
            view.record.device.id,
            view.verdict.state.value,
            f"{view.since_s:.0f} s",
            view.verdict.reason,
            view.record.device.address,
            node,
            *rollout,
        )
    )


def _cells(cells: Iterable[str]) -> str:
    # <bdi>: text in another direction must not reverse the rest of the row.
    return f"<tr>{''.join(f'<td><bdi>{escape(cell)}</bdi></td>' for cell in cells)}</tr>"
