"""Verbs about agents: list them, read what one said, have one probe now."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import click

from nomad_watchdog.commands._agent_logs import kubernetes_log, local_log, nomad_log
from nomad_watchdog.commands._api import Api
from nomad_watchdog.commands._shared import api_of, no_color, output_option, settings_of
from nomad_watchdog.errors import NotFoundError, TransientError, UserError
from nomad_watchdog.ids import parse_device_id, slug_of
from nomad_watchdog.render import age, cell, clean, print_json, print_table

EXIT_FAILED = 69
PROBE_S = 60.0
"""How long a run of all probes may take: the agent bounds each of them."""


@click.group()
def agents() -> None:
    """List agents, read their logs, have one probe now."""


@agents.command("ls")
@output_option()
@click.pass_context
def list_agents(ctx: click.Context, output: str) -> None:
    """List the agents as the scheduler sees them."""
    items = list(api_of(ctx).pages("/v1/agents"))
    if output == "json":
        print_json({"items": items})
        return
    preferred = ["device", "device_id", "epoch", "state", "node", "version", "age_s", "reason"]
    known = list(dict.fromkeys(key for item in items for key in item))
    columns = [key for key in preferred if key in known]
    if output == "wide" or not columns:
        columns += [key for key in known if key not in columns]
    rows = [
        [age(item.get(c)) if c.endswith("_s") else item.get(c) for c in columns] for item in items
    ]
    heads = [column.removesuffix("_s").replace("_", " ").upper() for column in columns]
    print_table(heads or ["no agents"], rows, no_color=no_color(ctx))


@agents.command()
@click.argument("device")
@click.option("-n", "--lines", type=click.IntRange(1, 100_000), default=100, show_default=True)
@output_option("table", "json")
@click.pass_context
def logs(ctx: click.Context, device: str, lines: int, output: str) -> None:
    """Print the last lines that the agent of a device has logged.

    With the local backend they are read from its file, so this must run where the agents do; with Nomad they
    are asked for from Nomad, which has them if the job's template collects logs; with Kubernetes from the API
    server."""
    slug = slug_of(parse_device_id(device))
    settings = settings_of(ctx)
    if settings.backend == "local":
        text = local_log(settings.local_directory / slug)
    elif settings.backend == "nomad":
        instance = str(_agent(api_of(ctx), device)["instance"])
        if not instance:
            raise TransientError(f"no agent of {device!a} has reported yet")
        text = asyncio.run(nomad_log(settings, instance))
    elif settings.backend == "kubernetes":
        text = asyncio.run(kubernetes_log(settings, slug))
    else:
        raise UserError(
            f"backend {settings.backend!a} has no logs here; local, nomad and kubernetes do"
        )
    last = text.splitlines()[-lines:]
    if output == "json":
        print_json({"device": device, "lines": last})
        return
    for line in last:
        click.echo(clean(line))


@agents.command("exec-probe")
@click.argument("device")
@output_option("table", "json")
@click.pass_context
def exec_probe(ctx: click.Context, device: str, output: str) -> None:
    """Have the agent of a device run all its probes now, and show each result.

    The agent is asked directly, so its address must be reachable from here. What it finds is shown and
    changes no verdict. Exits 69 if a probe fails."""
    listen = _agent(api_of(ctx), device)["listen"]
    if not listen:
        raise TransientError(f"no agent of {device!a} has reported yet")
    agent = Api(f"http://{listen}", timeout_s=5.0)  # without our token: it is not for agents
    told = _probed(agent)
    results: list[dict[str, Any]] = told["results"]
    failed = not all(one["ok"] for one in results)
    if output == "json":
        print_json({"device": device, "ok": not failed, "results": results})
    else:
        rows = [
            (r["probe"], "ok" if r["ok"] else "failed", age(r["took_s"]), cell(r["reason"]))
            for r in results
        ]
        print_table(("PROBE", "RESULT", "TOOK", "REASON"), rows, no_color=no_color(ctx))
    ctx.exit(EXIT_FAILED if failed else 0)


def _probed(agent: Api) -> Any:
    """The results of one run. Raises TransientError when they are not there in time."""
    run = agent.post("/probe", None)["run"]
    deadline = time.monotonic() + PROBE_S
    while time.monotonic() < deadline:
        told = agent.get("/probe")
        if told["run"] != run:
            raise TransientError("the agent was asked by somebody else meanwhile")
        if told["done"]:
            return told
        time.sleep(0.1)  # noqa: TID251  # a verb, with a deadline
    raise TransientError(f"the probes did not end within {PROBE_S:g} s")


def _agent(api: Api, device: str) -> dict[str, Any]:
    """The agent of a device as the API lists it. Raises NotFoundError."""
    for one in api.pages("/v1/agents", q=device):
        if one["id"] == device:
            return one
    raise NotFoundError(f"no agent of {device!a} is known; `devices get` says why")
