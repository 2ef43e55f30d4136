"""``agents``: list agents, print their logs, run their probes now."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import click

from nomad_watchdog.cli import _complete
from nomad_watchdog.cli._agent_logs import kubernetes_log, local_log, nomad_log
from nomad_watchdog.cli._answers import AgentAnswer, ProbeAnswer, ProbeRun, ProbeStarted
from nomad_watchdog.cli._api_client import ApiClient, device_path
from nomad_watchdog.cli._fields import field_text, head
from nomad_watchdog.cli._options import api_of, no_color, output_option, settings_of
from nomad_watchdog.device_address import endpoint
from nomad_watchdog.errors import NotFoundError, TransientError, UserError, WatchdogError
from nomad_watchdog.ids import parse_device_id, slug_of
from nomad_watchdog.terminal import cell, clean, print_json, print_table
from nomad_watchdog.units import age

if TYPE_CHECKING:
    from nomad_watchdog.config.settings import Settings

EXIT_FAILED: Final = 69
PROBE_S: Final = 60.0
"""Maximum duration of a run of all probes. The agent limits the duration of each probe."""


@click.group()
def agents() -> None:
    """List agents, print their logs, run their probes now."""


@agents.command("ls")
@output_option()
@click.pass_context
def list_agents(ctx: click.Context, output: str) -> None:
    """List the agents as the scheduler sees them."""
    items = list(api_of(ctx).pages("/v1/agents"))
    if output == "json":
        print_json({"items": items})
        return
    preferred = ["id", "class", "epoch", "state", "node", "version", "age_s", "reason"]
    known = list(dict.fromkeys(key for item in items for key in item))
    columns = [key for key in preferred if key in known]
    if output == "wide" or not columns:
        columns += [key for key in known if key not in columns]
    rows = [[field_text(c, item.get(c)) for c in columns] for item in items]
    heads = [head(column) for column in columns]
    print_table(heads or ["no agents"], rows, no_color=no_color(ctx))


@agents.command()
@click.argument("device", shell_complete=_complete.devices)
@click.option("-n", "--lines", type=click.IntRange(1, 100_000), default=100, show_default=True)
@output_option("table", "json")
@click.pass_context
def logs(ctx: click.Context, device: str, lines: int, output: str) -> None:
    """Print the last log lines of a device's agent.

    With the local backend the lines are read from a file, so this must run on the machine of the agents. Nomad
    has them only if the job's template collects logs. Kubernetes returns them through its API server. Exits 66
    if the device is not registered, or its agent has no log."""
    try:
        text = _log(ctx, settings_of(ctx), device)
    except NotFoundError:
        _check_registered(ctx, device)
        raise
    last = text.splitlines()[-lines:]
    if output == "json":
        print_json({"device": device, "lines": last})
        return
    for line in last:
        click.echo(clean(line))


def _log(ctx: click.Context, settings: Settings, device: str) -> str:
    slug = slug_of(parse_device_id(device))
    if settings.backend == "local":
        return local_log(settings.local_directory / slug)
    if settings.backend == "nomad":
        instance = _agent(api_of(ctx), device)["instance"]
        if not instance:
            raise TransientError(f"no agent of {device!a} has reported yet")
        return asyncio.run(nomad_log(settings, instance))
    if settings.backend == "kubernetes":
        return asyncio.run(kubernetes_log(settings, slug))
    raise UserError(
        f"logs of backend {settings.backend!a} are not supported; those of local, nomad and kubernetes are"
    )


def _check_registered(ctx: click.Context, device: str) -> None:
    """Raises NotFoundError, with a hint, when the API answers that the device is not registered."""
    try:
        api_of(ctx).get(device_path(device))
    except NotFoundError:
        raise
    except WatchdogError:
        return  # without the API it is unknown


@agents.command("exec-probe")
@click.argument("device", shell_complete=_complete.devices)
@output_option("table", "json")
@click.pass_context
def exec_probe(ctx: click.Context, device: str, output: str) -> None:
    """Run all probes of a device's agent now, and show each result.

    Calls the agent directly, so its address must be reachable from here. The results change no verdict. Exits 69
    if a probe fails or can't be run."""
    listen = _agent(api_of(ctx), device)["listen"]
    if not listen:
        raise TransientError(f"no agent of {device!a} has reported yet")
    # The address comes from the agent: it must be a host and a port. The API token is not sent to agents.
    agent = ApiClient(f"http://{endpoint(listen)}", timeout_s=5.0)
    results = _run_probes(agent)["results"]
    failed = not all(one["ok"] for one in results)
    if output == "json":
        print_json({"device": device, "ok": not failed, "results": results})
    else:
        rows = [
            (r["probe"], _result(r), age(r["took_s"]), cell(r.get("warning") or r["reason"]))
            for r in results
        ]
        print_table(("PROBE", "RESULT", "TOOK", "REASON"), rows, no_color=no_color(ctx))
    ctx.exit(EXIT_FAILED if failed else 0)


def _result(one: ProbeAnswer) -> str:
    """The outcome of one probe. Older agents do not report `outcome`."""
    if one["ok"]:
        return "warning" if one.get("warning") else "ok"
    return "unable" if one.get("outcome") == "unable" else "failed"


def _run_probes(agent: ApiClient) -> ProbeRun:
    """The results of one run. Raises TransientError when they are not available in time."""
    run = agent.post("/probe", None, ProbeStarted)["run"]
    deadline = time.monotonic() + PROBE_S
    while time.monotonic() < deadline:
        answer = agent.get("/probe", ProbeRun)
        if answer["run"] != run:
            raise TransientError("another client has started a new run meanwhile")
        if answer["done"]:
            return answer
        time.sleep(0.1)  # noqa: TID251  # a command, with a deadline
    raise TransientError(f"the probes did not end within {PROBE_S:g} s")


def _agent(api: ApiClient, device: str) -> AgentAnswer:
    """The agent of a device as the API lists it. Raises NotFoundError."""
    for one in api.pages("/v1/agents", q=device):
        if one.get("id") == device:
            return api.parsed(one, AgentAnswer)
    api.get(device_path(device))  # an unknown device has an error of its own
    raise NotFoundError(
        f"no agent of {device!a} is known; `nomad-watchdog explain` shows the reason"
    )
