"""``devices``: the registry, through the API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TextIO

import click

from nomad_watchdog.cli import _complete
from nomad_watchdog.cli._answers import BulkAnswer, BulkItemAnswer, Fields
from nomad_watchdog.cli._api_client import ApiClient, device_path
from nomad_watchdog.cli._fields import field_text, head
from nomad_watchdog.cli._options import api_of, no_color, output_option, require_terminal
from nomad_watchdog.device_address import device_address
from nomad_watchdog.errors import NotFoundError, UserError
from nomad_watchdog.ids import parse_device_id
from nomad_watchdog.labels import parse_labels
from nomad_watchdog.terminal import clean, print_json, print_table

if TYPE_CHECKING:
    from nomad_watchdog.controllers.device_list import ListedDevice

COLUMNS: Final = ("id", "class", "verdict", "since_s", "address", "node", "reason")
WIDE: Final = (
    *COLUMNS[:-1], "presence", "generation", "epoch", "version", "placement_state", "agent_age_s",
    "instance", "slug", "labels", "source", "ttl", "expires_in_s", "flapping", "paused", "reason",
)  # fmt: skip
BATCH: Final = 500
MAX_LINE: Final = 64 * 1024
MAX_REJECTED: Final = 20
"""Rejected lines that are printed one by one."""


@click.group()
def devices() -> None:
    """Add, list and remove devices."""


@devices.command()
@click.argument("device_id", metavar="ID", shell_complete=_complete.devices)
@click.option("--address", required=True, help="Host name or IP address to probe.")
@click.option(
    "--class",
    "agent_class",
    shell_complete=_complete.agent_classes,
    help='Agent class [default: "default"].',
)
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="May be repeated.")
@click.option(
    "--ttl",
    metavar="DURATION",
    help='Expires if no heartbeat arrives within this time ("90s"); 0s = never.',
)
@output_option("table", "json")
@click.pass_context
def add(  # click hands over one argument an option
    ctx: click.Context,
    device_id: str,
    address: str,
    agent_class: str | None,
    labels: tuple[str, ...],
    ttl: str | None,
    output: str,
) -> None:
    """Register or update a device. Idempotent.

    Exits 64 if the agent class is not configured."""
    parse_device_id(device_id)
    address = device_address(address)
    body: Fields = {"address": address, "labels": parse_labels(labels)}
    body |= {"class": agent_class} if agent_class is not None else {}
    body |= {"ttl": ttl} if ttl else {}
    answer = api_of(ctx).put(device_path(device_id), body)
    if output == "json":
        print_json(answer)
    else:
        click.echo(f"{clean(device_id)}: registered")


@devices.command("ls")
@click.option(
    "--class", "agent_class", shell_complete=_complete.agent_classes, help="Only this agent class."
)
@click.option("--verdict", shell_complete=_complete.verdicts, help="Only this verdict.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="May be repeated.")
@click.option("-q", "--query", help="Only IDs containing this text.")
@click.option("--limit", type=click.IntRange(1, 2**31), help="Maximum number of rows.")
@output_option()
@click.pass_context
def list_devices(  # click hands over one argument an option
    ctx: click.Context,
    agent_class: str | None,
    verdict: str | None,
    labels: tuple[str, ...],
    query: str | None,
    limit: int | None,
    output: str,
) -> None:
    """List devices with their verdicts."""
    parse_labels(labels)
    found = api_of(ctx).devices(
        **{"class": agent_class, "verdict": verdict, "label": labels, "q": query}
    )
    items = [item for item, _ in zip(found, range(limit), strict=False)] if limit else list(found)
    print_devices(items, output, no_color=no_color(ctx))


@devices.command()
@click.argument("device_id", metavar="ID", shell_complete=_complete.devices)
@output_option()
@click.pass_context
def get(ctx: click.Context, device_id: str, output: str) -> None:
    """Show one device."""
    item = api_of(ctx).get(device_path(device_id))
    if output == "json":
        print_json(item)
    else:
        print_devices([item], output, no_color=no_color(ctx))


@devices.command()
@click.argument(
    "device_ids", metavar="ID...", nargs=-1, required=True, shell_complete=_complete.devices
)
@click.option(
    "--now/--grace",
    "now",
    default=True,
    show_default=True,
    help="Stop the agent at once, or keep it for presence.grace in case the device comes back.",
)
@click.pass_context
def rm(ctx: click.Context, device_ids: tuple[str, ...], now: bool) -> None:
    """Stop watching devices. A device that has left already is not an error. Exits 66 if a device is unknown."""
    api = api_of(ctx)
    code = 0
    for device_id in device_ids:
        try:
            api.delete(device_path(device_id) + ("" if now else "?now=false"))
        except NotFoundError as error:
            # The other devices are still removed; the exit code reports this one.
            click.echo(f"error: {clean(error)}", err=True)
            code = error.exit_code
        else:
            click.echo(f"{clean(device_id)}: removed")
    ctx.exit(code)


@devices.command("import")
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "hcl", "csv"]),
    help='Format of FILE [default: by its name; json for "-"].',
)
@click.option("--dry-run", is_flag=True, help="Only print what would change.")
@click.option(
    "--prune", is_flag=True, help="Also remove registered devices that FILE does not list."
)
@click.option("--auto-approve", is_flag=True, help="Skip the confirmation that --prune asks for.")
@click.pass_context
def import_devices(  # click hands over one argument an option
    ctx: click.Context,
    file: TextIO,
    form: str | None,
    dry_run: bool,
    prune: bool,
    auto_approve: bool,
) -> None:
    """Register the devices of FILE ("-" = standard input): JSON (one object per line, as `devices export` prints
    them, or one array), HCL (as an inventory), or CSV (columns id, address, class, ttl, label.NAME). The whole file is
    checked before the first device is sent, and all errors are printed with their line numbers.

    Exits 64 if a line is rejected, by this check or by the API; the valid lines are registered."""
    wanted = _items(file, form)
    if prune and not wanted:
        raise UserError(
            "the file lists no device, perhaps because it is incomplete; --prune would remove all. To remove devices, "
            "run `devices rm`"
        )
    api = api_of(ctx)
    removed: list[str] = []
    if dry_run or prune:
        from nomad_watchdog.cli._import_diff import compare

        diff = compare(wanted, api.devices(), prune=prune)
        asks = bool(diff.removed) and not auto_approve
        if dry_run or asks:
            for line in diff.lines():
                click.echo(line, err=not dry_run)
        if dry_run:
            return
        if asks:
            require_terminal()
            click.confirm(f"remove {len(diff.removed)} devices?", abort=True, err=True)
        removed = diff.removed
    rejected = _send(api, wanted, removed)
    if rejected:
        more = [f"and {len(rejected) - MAX_REJECTED} more"] if len(rejected) > MAX_REJECTED else []
        raise UserError("\n".join(["rejected:", *rejected[:MAX_REJECTED], *more]))


def _send(api: ApiClient, wanted: Sequence[ListedDevice], removed: Sequence[str]) -> list[str]:
    """Register and remove in batches; the items that the API rejects, in words."""
    rejected: list[str] = []
    for start in range(0, len(wanted), BATCH):
        batch = wanted[start : start + BATCH]
        results = _bulk(api, [one.fields for one in batch], [])
        for one, result in zip(batch, results, strict=False):
            if result["status"] >= 400:
                name = ascii(one.device.id)[:80]
                rejected.append(f"{one.where}: {name}: {result.get('error')}")
    stored = len(wanted) - len(rejected)
    click.echo(f"{stored} device{'s' * (stored != 1)} registered", err=True)
    if rejected and removed:
        click.echo("nothing was removed, because devices were rejected", err=True)
        return rejected
    gone = 0
    for start in range(0, len(removed), BATCH):
        names = removed[start : start + BATCH]
        for name, result in zip(names, _bulk(api, [], names), strict=False):
            gone += result["status"] < 400
            if result["status"] >= 400:
                rejected.append(f"remove {ascii(name)[:80]}: {result.get('error')}")
    if removed:
        click.echo(f"{gone} device{'s' * (gone != 1)} removed", err=True)
    return rejected


def _bulk(api: ApiClient, devices: Sequence[Fields], delete: Sequence[str]) -> list[BulkItemAnswer]:
    body = {"devices": list(devices), "delete": list(delete)}
    return api.post("/v1/devices:bulk", body, BulkAnswer)["results"]


@devices.command("export")
@click.pass_context
def export(ctx: click.Context) -> None:
    """Print the registered devices as JSON lines, for `devices import`."""
    for item in api_of(ctx).devices():
        if item.get("presence", "present") == "present":
            wanted = {key: item.get(key) for key in ("id", "class", "address", "labels")}
            if item.get("ttl") is not None:
                wanted["ttl"] = item["ttl"]
            click.echo(json.dumps(wanted, ensure_ascii=True))


def print_devices(items: list[Fields], output: str, *, no_color: bool) -> None:
    if output == "json":
        print_json({"items": items})
        return
    columns = WIDE if output == "wide" else COLUMNS
    rows = [[field_text(name, item.get(name)) for name in columns] for item in items]
    print_table([head(name) for name in columns], rows, no_color=no_color)


def _items(file: TextIO, form: str | None) -> list[ListedDevice]:
    """The devices of the file. Raises UserError with all errors."""
    from nomad_watchdog.controllers import device_list, inventory_file

    name = getattr(file, "name", "-")
    try:
        text = file.read(inventory_file.MAX_BYTES + 1).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text at byte {error.start}; nothing was sent") from None
    if len(text) > inventory_file.MAX_BYTES:
        raise UserError(f"more than {inventory_file.MAX_BYTES} bytes; nothing was sent")
    try:
        return device_list.parse(text, form or device_list.format_of(str(name)), str(name))
    except UserError as error:
        raise UserError(f"{error}\nnothing was sent") from None
