"""The document that configures an agent: the part of its class, extended by the part of its device.

The class's part is the mapping `AgentSpec.agent_config`. It is shared by all starts and must not be changed in place.
Documents are serialized only where they leave: to a scheduler, to a file, or to the registry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Final

from watchdog_agent.config import document as config
from watchdog_agent.runtime.parsing import loads
from watchdog_agent.wire import agent_config

from nomad_watchdog.device_address import device_address
from nomad_watchdog.errors import UserError
from nomad_watchdog.fast_json import as_json
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch

CREDENTIAL: Final = "credential"
"""Field of the token of a single agent (watchdog_agent.wire)."""
_FILES: Final = ("ca_cert", "client_cert", "client_key")
"""Settings of a probe or a repair whose files the agent reads when it checks its document."""


def with_fields(spec: AgentSpec, **fields: object) -> AgentSpec:
    """The spec with these fields in its agents' documents. Its hash stays."""
    return replace(spec, agent_config=dict(sorted({**spec.agent_config, **fields}.items())))


def addressed(spec: AgentSpec, addresses: Sequence[str]) -> AgentSpec:
    """The spec whose agents report to these addresses (base URLs, tried in this order). The spec itself if there are
    no addresses or it already has these."""
    if not addresses or api_of(spec) == tuple(addresses):
        return spec
    return with_fields(spec, api=list(addresses))


def api_of(spec: AgentSpec) -> tuple[str, ...]:
    """The addresses that the agents of a spec report to."""
    found = spec.agent_config.get("api")
    return tuple(map(str, found)) if isinstance(found, list | tuple) else ()


def check_class(spec: AgentSpec) -> None:
    """Raises UserError when an agent would reject the class's part of its document.

    Runs the agent's own check, but not for files that exist only on its host."""
    part = dict(spec.agent_config)
    for name in ("probes", "confirm", "repairs"):
        found = part.get(name)
        part[name] = [_without_files(one) for one in found] if isinstance(found, list) else []
    part["consul_tls"] = {}
    sample = agent_config(
        part, device_id="device", slug="device", epoch=1, address="127.0.0.1", labels={}
    )
    try:
        config.check(sample)
    except config.ConfigError as error:
        raise UserError(f"class {spec.agent_class}: its agents would reject {error}") from None


def _without_files(part: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in part.items() if name not in _FILES}


def document(record: DeviceRecord, epoch: Epoch, part: Mapping[str, object]) -> dict[str, object]:
    """The document of one agent. `part`: of its class.

    Raises UserError when the device's address is not valid. A version without this check may have stored it, and an
    agent would reject it."""
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


def serialize(document: Mapping[str, object], max_bytes: int) -> bytes:
    """A document as compact UTF-8. Raises UserError when it has more than `max_bytes` bytes."""
    data = as_json(document)
    if len(data) > max_bytes:
        raise UserError(
            f"the agent's configuration has {len(data)} bytes; at most {max_bytes} are allowed"
        )
    return data


def stored_spec(spec: AgentSpec) -> dict[str, object]:
    """The fields of a spec as the registry stores them: the class's part of the agent's document as JSON text with
    sorted keys."""
    fields = asdict(spec) | {"agent_config": to_text(spec.agent_config)}
    del fields["avoid"], fields["agent_file"]
    return fields


def spec_fields(stored: object) -> object:
    """The fields of a spec as they were before `stored_spec`. Raises ValueError when the text is not a JSON object."""
    if not isinstance(stored, dict) or not isinstance(text := stored.get("agent_config"), str):
        return stored
    return stored | {"agent_config": from_text(text)}


def to_text(part: Mapping[str, object]) -> str:
    """A class's part as JSON with sorted keys."""
    return json.dumps(part, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def from_text(text: str) -> dict[str, object]:
    """A class's part from its text. Raises ValueError when that is not a JSON object."""
    part = loads(text)
    if not isinstance(part, dict):
        raise ValueError("the configuration of an agent must be a JSON object")  # noqa: TRY004  # as loads
    return part
