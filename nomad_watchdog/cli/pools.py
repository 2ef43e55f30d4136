"""``pools``: the pools of workers, how many each has and why, and an operator's word on it."""

from __future__ import annotations

from typing import Any

import click

from nomad_watchdog.cli._api_client import ApiClient, quoted
from nomad_watchdog.cli._options import api_of, no_color, output_option
from nomad_watchdog.terminal import clean, print_json, print_table


@click.group()
def pools() -> None:
    """List worker pools, scale one manually, stop one that is no longer configured."""


@pools.command("ls")
@output_option("table", "json")
@click.pass_context
def list_pools(ctx: click.Context, output: str) -> None:
    """List pools with their workers, their metric, and the reason for the count."""
    items = _pools(api_of(ctx))[1]["items"]
    if output == "json":
        print_json({"items": items})
        return
    heads = ["POOL", "WORKERS", "RUNNING", "BOUNDS", "METRIC", "VALUE", "TARGET", "SCALER", "WHY"]
    print_table(heads if items else ["no pools"], map(_row, items), no_color=no_color(ctx))


@pools.command()
@click.argument("pool", metavar="POOL")
@click.argument("count", metavar="COUNT", type=click.IntRange(0))
@click.pass_context
def scale(ctx: click.Context, pool: str, count: int) -> None:
    """Scale POOL to COUNT workers, within its bounds.

    With the built-in scaler the metric has its say again after the cool-down."""
    _keeper(api_of(ctx)).post(f"/v1/pools/{quoted(pool)}/scale", {"count": count})
    click.echo(f"{clean(pool)}: {count} workers asked for")


@pools.command()
@click.argument("pool", metavar="POOL")
@click.pass_context
def rm(ctx: click.Context, pool: str) -> None:
    """Stop a pool that is no longer configured."""
    _keeper(api_of(ctx)).delete(f"/v1/pools/{quoted(pool)}")
    click.echo(f"{clean(pool)}: removed")


def _keeper(api: ApiClient) -> ApiClient:
    return _pools(api)[0]


def _pools(api: ApiClient) -> tuple[ApiClient, Any]:
    """The replica that keeps the pools, and what it says of them; the one that was asked when it does, or
    nobody does now."""
    said = api.get("/v1/pools")
    if said["keeper"]:
        return api, said
    leases = api.get("/v1/leases")
    found = [one["api"] for one in leases["shards"] if one["shard"] == 0 and one["api"]]
    if len(leases["replicas"]) < 2 or not found:
        return api, said
    keeper = api.at(found[0])
    return keeper, keeper.get("/v1/pools")


def _row(item: dict[str, Any]) -> list[object]:
    if not item["configured"]:
        return [item["name"], item["count"], item["running"], *[""] * 5, item["problem"]]
    scaler = f"{item['scaler']}, dry run" if item["dry_run"] else item["scaler"]
    return [
        item["name"],
        item["count"],
        item["running"],
        f"{item['min']} to {item['max']}",
        item["metric"],
        "" if item["value"] is None else f"{item['value']:g}",
        "" if item["target"] is None else f"{item['target']:g}",
        scaler,
        item["problem"] or item["reason"],
    ]
