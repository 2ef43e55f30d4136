"""``pools``: list worker pools, scale them, remove them."""

from __future__ import annotations

import click

from nomad_watchdog.cli import _complete
from nomad_watchdog.cli._answers import LeasesAnswer, PoolAnswer, PoolsAnswer
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
@click.argument("pool", metavar="POOL", shell_complete=_complete.pools)
@click.argument("count", metavar="COUNT", type=click.IntRange(0))
@click.pass_context
def scale(ctx: click.Context, pool: str, count: int) -> None:
    """Scale POOL to COUNT workers, within its bounds.

    With the built-in scaler, the autoscaler takes over again after the cool-down."""
    _controller(api_of(ctx)).post(f"/v1/pools/{quoted(pool)}/scale", {"count": count})
    click.echo(f"{clean(pool)}: {count} workers requested")


@pools.command()
@click.argument("pool", metavar="POOL", shell_complete=_complete.pools)
@click.pass_context
def rm(ctx: click.Context, pool: str) -> None:
    """Stop a pool that is no longer configured."""
    _controller(api_of(ctx)).delete(f"/v1/pools/{quoted(pool)}")
    click.echo(f"{clean(pool)}: removed")


def _controller(api: ApiClient) -> ApiClient:
    return _pools(api)[0]


def _pools(api: ApiClient) -> tuple[ApiClient, PoolsAnswer]:
    """The replica that controls the pools, and its pools. If no replica controls them now: this one."""
    pools = api.get("/v1/pools", PoolsAnswer)
    if pools["keeper"]:
        return api, pools
    leases = api.get("/v1/leases", LeasesAnswer)
    found = [one["api"] for one in leases["shards"] if one["shard"] == 0 and one["api"]]
    if len(leases["replicas"]) < 2 or not found:
        return api, pools
    controller = api.at(found[0])
    return controller, controller.get("/v1/pools", PoolsAnswer)


def _row(item: PoolAnswer) -> list[object]:
    if not item["configured"]:
        return [item["name"], item["count"], item["running"], *[""] * 5, item["problem"]]
    scaler = item.get("scaler", "")
    return [
        item["name"],
        item["count"],
        item["running"],
        f"{item.get('min')} to {item.get('max')}",
        item.get("metric"),
        _number(item.get("value")),
        _number(item.get("target")),
        f"{scaler}, dry run" if item.get("dry_run") else scaler,
        item["problem"] or item.get("reason"),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
