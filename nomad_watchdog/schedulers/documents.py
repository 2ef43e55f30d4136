"""The document that tells an agent what it is: its class's part with its device's laid over it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from watchdog_agent.wire import agent_config

from nomad_watchdog.compact import as_json
from nomad_watchdog.errors import UserError
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch


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
    return json.loads(text)


def document(record: DeviceRecord, epoch: Epoch, part: Mapping[str, Any]) -> dict[str, Any]:
    """Of one agent; `part` as from `class_part`."""
    device = record.device
    return agent_config(
        dict(part),
        device_id=device.id,
        slug=record.slug,
        epoch=epoch,
        address=device.address,
        labels=dict(device.labels),
    )


def packed(told: Mapping[str, Any], most: int) -> bytes:
    """A document as UTF-8, as short as it gets. Raises UserError when it has more than `most` bytes."""
    data = as_json(told)
    if len(data) > most:
        raise UserError(
            f"the agent's configuration is {len(data)} bytes; at most {most} are allowed"
        )
    return data
