"""The document that tells an agent what it is: its class's part with its device's laid over it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

from watchdog_agent.config import document as config
from watchdog_agent.runtime.parsing import loads
from watchdog_agent.wire import agent_config

from nomad_watchdog.device_address import device_address
from nomad_watchdog.errors import UserError
from nomad_watchdog.fast_json import as_json
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch

_FILES: Final = ("ca_cert", "client_cert", "client_key")
"""Settings of a probe or a repair whose files the agent reads when it checks its document."""


def class_part(spec: AgentSpec) -> dict[str, Any]:
    """Raises UserError when `agent_config` is no JSON object."""
    try:
        part = _read(spec.agent_config)
    except ValueError as error:
        raise UserError(f"agent_config of class {spec.agent_class} is no JSON: {error}") from None
    if not isinstance(part, dict):
        raise UserError(f"agent_config of class {spec.agent_class} must be a JSON object")
    return dict(part)


@lru_cache(maxsize=64)
def _read(text: str) -> object:
    # One class's text is asked for at each start of its agents. Shared: to be copied before it is changed.
    return loads(text)


def addressed(spec: AgentSpec, addresses: Sequence[str]) -> AgentSpec:
    """The spec whose agents report to these addresses (base URLs, tried in this order); the spec itself when
    there are none or it says so already. Raises UserError when `agent_config` is no JSON object."""
    part = class_part(spec)
    if not addresses or part.get("api") == list(addresses):
        return spec
    text = json.dumps(part | {"api": list(addresses)}, sort_keys=True, separators=(",", ":"))
    return replace(spec, agent_config=text)


def api_of(spec: AgentSpec) -> tuple[str, ...]:
    """The addresses that the agents of a spec report to. Raises UserError when `agent_config` is no JSON object."""
    return tuple(class_part(spec).get("api", ()))


def check_class(spec: AgentSpec) -> None:
    """Raises UserError when an agent would reject the class's part of its document.

    The agent's own check, but for files that only its host has."""
    part = class_part(spec)
    for name in ("probes", "confirm", "repairs"):
        part[name] = [_without_files(one) for one in part.get(name, [])]
    part["consul_tls"] = {}
    sample = agent_config(
        part, device_id="device", slug="device", epoch=1, address="127.0.0.1", labels={}
    )
    try:
        config.check(sample)
    except config.ConfigError as error:
        raise UserError(f"class {spec.agent_class}: its agents would reject {error}") from None


def _without_files(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name not in _FILES}


def document(record: DeviceRecord, epoch: Epoch, part: Mapping[str, Any]) -> dict[str, Any]:
    """Of one agent; `part` as from `class_part`. Raises UserError when the device's address is none: it may
    have been stored by a version that knew no rule, and an agent would reject it."""
    device = record.device
    try:
        address = device_address(device.address)
    except UserError as error:
        raise UserError(f"address: {error}") from None
    return agent_config(
        dict(part),
        device_id=device.id,
        slug=record.slug,
        epoch=epoch,
        address=address,
        labels=dict(device.labels),
    )


def serialize(document: Mapping[str, Any], max_bytes: int) -> bytes:
    """A document as UTF-8, as short as it gets. Raises UserError when it has more than `max_bytes` bytes."""
    data = as_json(document)
    if len(data) > max_bytes:
        raise UserError(
            f"the agent's configuration is {len(data)} bytes; at most {max_bytes} are allowed"
        )
    return data
