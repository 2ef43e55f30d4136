"""What is stored of a spec, and what is not."""

from __future__ import annotations

from dataclasses import replace

from pydantic import TypeAdapter

from nomad_watchdog.model import AgentSpec
from nomad_watchdog.schedulers.agent_document import spec_fields, stored_spec


def test_the_hosts_to_avoid_belong_to_one_start() -> None:
    """They are not stored, so that an older version can read what this one writes, and no later start has them."""
    spec = AgentSpec("default", "1", "h", agent_config={"v": 1})
    stored = stored_spec(replace(spec, avoid=("n1",)))
    assert "avoid" not in stored
    assert TypeAdapter(AgentSpec).validate_python(spec_fields(stored)).avoid == ()
    assert replace(spec, avoid=("n1",)) == spec
