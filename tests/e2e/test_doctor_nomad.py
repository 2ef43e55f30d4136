"""`doctor` queries Nomad like the control plane: with the same region, namespace and jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomad_watchdog.config.load import load
from nomad_watchdog.daemon.doctor.base import Check
from nomad_watchdog.daemon.doctor.checks import examine
from servers.nomad import NomadServer

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.servers]


async def told(
    nomad: NomadServer, folder: Path, variables: str = "", **env: str
) -> dict[str, Check]:
    """What doctor finds about Nomad, by name of check."""
    file = folder / "w.hcl"
    file.write_text(
        f'backend = "nomad"\ndata_dir = "{folder}"\nregistry {{\n  kind = "sqlite"\n}}\n'
        'consul {\n  agent_address = ""\n}\n'
        'agent_class "good" {\n  probe "tcp" { port = 80 }\n}\n'
        f'agent_class "camera" {{\n  probe "tcp" {{ port = 80 }}\n  {variables}\n}}\n'
    )
    env = {"NOMAD_ADDR": nomad.http_addr, "HOME": "/nowhere", **env}
    return {check.name: check for check in await examine(load(file, env), env)}


async def test_a_region_that_does_not_exist_is_named(nomad: NomadServer, tmp_path: Path) -> None:
    """doctor uses NOMAD_REGION, and names the existing regions (C5)."""
    found = (await told(nomad, tmp_path, NOMAD_REGION="globl"))["nomad region"]
    assert found.status == "fail"
    assert "no region 'globl'; did you mean global? there are: global" in found.found
    assert "nomad region" not in await told(nomad, tmp_path, NOMAD_REGION="global")


async def test_a_namespace_that_does_not_exist_is_named(nomad: NomadServer, tmp_path: Path) -> None:
    """Nomad lists no jobs for such a namespace instead of an error: doctor checks it by name
    (C5)."""
    found = (await told(nomad, tmp_path, NOMAD_NAMESPACE="nosuch"))["nomad namespace"]
    assert (found.status, found.found) == ("fail", "there is no namespace 'nosuch'")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('template = "{mock}"\n variables = {{ pool = "nosuch" }}', "nonexistent node pool"),
        (
            'template = "{mock}"\n variables = {{ memory = "x" }}',
            "variable",
        ),  # which of several problems Nomad names first is random
        ('variables = {{ pyhton = "python3" }}', "did you mean python?"),
    ],
)
async def test_a_class_that_nomad_refuses_is_named_and_no_other(
    nomad: NomadServer, tmp_path: Path, setting: str, words: str
) -> None:
    """A missing node pool, a value that the template can't use, a misspelt variable (C6)."""
    mock = Path(__file__).parents[1] / "schedulers" / "mock.nomad.hcl"
    found = await told(nomad, tmp_path, setting.format(mock=mock))
    assert "class good" not in found
    assert found["class camera"].status == "fail"
    assert words in found["class camera"].found
