"""W4: what a reload of the configuration applies, what it leaves unchanged, and what it rejects as a whole."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.config.load import load
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.expiry import ExpiryController
from nomad_watchdog.controllers.inventory import InventoryController
from nomad_watchdog.core.host_load import PressureThresholds
from nomad_watchdog.core.relief import ReliefRules
from nomad_watchdog.core.settings_diff import words
from nomad_watchdog.daemon.reload import Reloader, applicable
from nomad_watchdog.errors import TransientError, UserError
from nomad_watchdog.host_pressure import Resource
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.schedulers.multi import MultiScheduler
from tests.api.conftest import ServedApi, served
from tests.simulation.fakes import REFUSED, Cluster, FakeScheduler

FILE = """\
data_dir = "{folder}"
api {{
  listen = "127.0.0.1:9999"
  token_file = "{folder}/token"
  agent_key_file = "{folder}/keys"
{api}
}}
agent_class "default" {{
{more}
  probe "tcp" {{ port = 80 }}
}}
{rest}
"""


class Picky(FakeScheduler):
    """Fails to prepare while `error` is set."""

    error: Exception | None = None

    async def prepare(
        self, specs: Any, *, shards: Any = None, trials: Any = ()
    ) -> Mapping[str, str]:
        if self.error is not None:
            raise self.error
        return await super().prepare(specs, shards=shards, trials=trials)


@dataclass
class Service:
    """The API, a reconciler that is not running, and a configuration file."""

    served_api: ServedApi
    folder: Path
    reloader: Reloader
    scheduler: Picky

    def write(self, api: str = "", more: str = "", rest: str = "") -> None:
        text = FILE.format(folder=self.folder, api=api, more=more, rest=rest)
        (self.folder / "watchdog.hcl").write_text(text)

    async def asked_with(self, token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return (await self.served_api.ask("GET", "/v1/status", headers=headers))[0]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    (tmp_path / "token").write_text("first-token-of-the-api")
    (tmp_path / "keys").write_text("k" * 32)
    text = FILE.format(folder=tmp_path, api="", more="", rest="")
    (tmp_path / "watchdog.hcl").write_text(text)

    def read() -> Settings:
        return load(tmp_path / "watchdog.hcl")

    settings = read()
    root = logging.getLogger()
    level = root.level
    async with served(tmp_path, authenticator=authenticator_of(settings.api)) as served_api:
        picky = Picky(Cluster())
        moving = MultiScheduler("local", lambda _name: picky, settings.spec_on)
        reconciler = Reconciler(served_api.fleet, moving, settings.specs(), served_api.metrics)
        departures = ExpiryController(served_api.fleet, served_api.metrics, reconciler.ownership)
        inventory = InventoryController((), served_api.fleet, departures, served_api.metrics)
        made = Reloader(
            settings,
            read,
            reconciler,
            moving,
            inventory,
            served_api.app_door,
            served_api.metrics,
        )
        served_api.app[CONTEXT].reloads = made
        yield Service(served_api, tmp_path, made, picky)
    root.setLevel(level)


async def test_tokens_limits_and_the_log_level_are_applied(service: Service) -> None:
    """The new token is valid and the old one is not, windows and grace periods are the new ones, and the answer names
    each change. Without a change the next reload does nothing."""
    fleet = service.served_api.fleet
    assert await service.asked_with("first-token-of-the-api") == 200
    (service.folder / "other").write_text("second-token-of-the-api")
    (service.folder / "watcher").write_text("third-token-of-the-api")
    service.write(
        api=f"""  rate = 500
  token "wall" {{
    role = "viewer"
    file = "{service.folder}/watcher"
  }}""",
        rest="""rollout { at_once = 7 }
presence {
  grace = "2m"
}
agents { startup_grace = "90s" }
incident { min = 9 }
resync = "17s"
nomad {
  drain = "wait"
  leave_ineligible = true
}
kubernetes { leave_cordoned = true }
log { level = "warning" }""",
    )
    text = (service.folder / "watchdog.hcl").read_text()
    (service.folder / "watchdog.hcl").write_text(text.replace('/token"', '/other"'))
    headers = {"Authorization": "Bearer first-token-of-the-api"}
    status, answer = await service.served_api.ask("POST", "/v1/config:reload", headers=headers)
    assert (status, answer["needs_restart"]) == (200, [])
    assert answer["changed"] == [
        "agents.startup_grace 1m → 90s",
        "api.rate 1000 → 500",
        "api.token added",
        f"api.token_file {service.folder}/token → {service.folder}/other",
        "incident.min 3 → 9",
        "kubernetes.leave_cordoned false → true",
        "log.level info → warning",
        "nomad.drain move → wait",
        "nomad.leave_ineligible false → true",
        "presence.grace 30s → 2m",
        "resync 30s → 17s",
        "rollout.at_once 5 → 7",
    ]
    assert await service.asked_with("first-token-of-the-api") == 401
    assert await service.asked_with("second-token-of-the-api") == 200
    assert await service.asked_with("third-token-of-the-api") == 200
    assert fleet.limits.replace_at_once == 7
    assert fleet.limits.leaves == {"ineligible", "cordoned"}
    assert fleet.presence.heartbeats.rules.grace_s == 120.0
    assert fleet.recorder._start_times.grace("default").seconds == 90.0
    assert fleet.recorder.incidents._correlator.limits.least == 9
    assert service.reloader.reconciler.informer.until_resync_s <= 17.0
    assert service.served_api.app_door.buckets is not None
    assert service.served_api.app_door.buckets.rate == 500
    assert logging.getLogger().level == logging.WARNING
    assert (await service.reloader.reload()).changed == ()


@pytest.mark.parametrize(
    ("api", "more", "rest"),
    [
        ("", '  memroy = "96Mi"', ""),
        ('  webhook_secrets_file = "/nowhere/secrets"', '  memory = "96Mi"', ""),
        ("", "", 'agent_class "two" {'),
    ],
)
async def test_what_is_wrong_changes_nothing_at_all(
    service: Service, api: str, more: str, rest: str
) -> None:
    """A wrong setting, a missing secret, an incomplete file: no part is applied."""
    before = (
        service.reloader.settings,
        service.served_api.fleet.limits,
        service.served_api.fleet.classes,
    )
    hashes = dict(service.reloader.reconciler.classes.hashes)
    service.write(api, more, rest + "\nrollout { at_once = 7 }")
    with pytest.raises(UserError):
        await service.reloader.reload()
    after = (
        service.reloader.settings,
        service.served_api.fleet.limits,
        service.served_api.fleet.classes,
    )
    assert after == before
    assert service.reloader.reconciler.classes.hashes == hashes
    assert service.reloader.problem
    status = service.served_api.fleet.views.status()["config"]
    assert isinstance(status, dict)
    assert status["problem"] == service.reloader.problem
    kinds = [event.kind for event in service.served_api.fleet.events.own.after(0, 99)[0]]
    assert kinds.count("config.rejected") == 1
    service.write(rest="rollout { at_once = 7 }")
    assert (await service.reloader.reload()).changed == ("rollout.at_once 5 → 7",)
    assert service.reloader.problem == ""


async def test_classes_that_the_scheduler_refuses_change_nothing(service: Service) -> None:
    """A refusal is returned and the old classes stay; if the scheduler does not answer now, classes are prepared
    later."""
    service.write(more='  memory = "96Mi"', rest="rollout { at_once = 7 }")
    service.scheduler.error = UserError("no such driver")
    hashes = dict(service.reloader.reconciler.classes.hashes)
    with pytest.raises(UserError, match="no such driver"):
        await service.reloader.reload()
    assert service.reloader.reconciler.classes.hashes == hashes
    assert service.served_api.fleet.limits.replace_at_once == 5
    service.scheduler.error = TransientError("no leader")
    changed = (await service.reloader.reload()).changed
    assert changed == ("agent_class.default.memory 64Mi → 96Mi", "rollout.at_once 5 → 7")
    assert service.reloader.reconciler.classes.hashes == hashes, (
        "not before the scheduler is prepared"
    )
    service.scheduler.error = None
    await service.reloader.reconciler._follow_classes()
    assert service.reloader.reconciler.classes.hashes != hashes


def class_two(more: str) -> str:
    return (
        f'agent_class "two" {{\n probe "tcp" {{ port = 81 }}\n{more}\n}}\nrollout {{ at_once = 7 }}'
    )


async def test_a_class_whose_template_is_missing_affects_only_itself(service: Service) -> None:
    """The rest is applied, its devices may be registered, and the answer, `status` and the plan have the reason. The
    template is read again automatically, with the settings of the reload, and by the next reload."""
    reconciler, fleet = service.reloader.reconciler, service.served_api.fleet
    file = service.folder / "agent.hcl"
    service.write(rest=class_two(f' template = "{file}"'))
    headers = {"Authorization": "Bearer first-token-of-the-api"}
    status, answer = await service.served_api.ask("POST", "/v1/config:reload", headers=headers)
    assert status == 200
    assert "rollout.at_once 5 → 7" in answer["changed"]
    assert "No such file" in answer["unprepared_classes"]["two"]
    assert fleet.limits.replace_at_once == 7
    assert fleet.classes == frozenset({"default", "two"})
    assert service.reloader.inventory.classes == fleet.classes
    assert reconciler.classes.hashes.keys() == {"default"}
    assert fleet.views.status()["unprepared_classes"] == answer["unprepared_classes"]
    assert reconciler.plan_builder.view()["unprepared_classes"] == answer["unprepared_classes"]
    file.write_text("job {}")
    await reconciler.classes.prepare_again()
    assert reconciler.classes.hashes.keys() == {"default", "two"}
    assert fleet.views.status()["unprepared_classes"] == {}
    file.unlink()
    assert (await service.reloader.reload()).unprepared.keys() == {"two"}
    assert reconciler.classes.hashes.keys() == {"default"}
    file.write_text("job {}")
    assert (await service.reloader.reload()).unprepared == {}
    assert reconciler.classes.hashes.keys() == {"default", "two"}
    kinds = [event.kind for event in fleet.events.own.after(0, 99)[0]]
    assert [kind for kind in kinds if kind.startswith("class.")] == [
        "class.unprepared",
        "class.prepared",
        "class.unprepared",
        "class.prepared",
    ]


async def test_a_class_that_the_scheduler_refuses_affects_only_itself(service: Service) -> None:
    """Its new version is in force and nothing is started with it; a reload with a fix is enough. Meanwhile the
    scheduler is not asked again at every pass."""
    reconciler, fleet = service.reloader.reconciler, service.served_api.fleet
    refused = f' variables = {{ {REFUSED} = "no such pool" }}'
    service.write(rest=class_two(refused))
    done = await service.reloader.reload()
    assert done.unprepared == {"two": "no such pool"}
    assert "classes that can't be prepared: two" in str(done)
    assert fleet.limits.replace_at_once == 7
    assert fleet.classes == frozenset({"default", "two"})
    assert reconciler.classes.hashes.keys() == {"default"}
    assert reconciler.classes.behind() == frozenset()
    service.scheduler.error = TransientError("no leader")
    service.write(rest=class_two(""))
    await service.reloader.reload()
    assert reconciler.classes.behind() == frozenset({"two"})
    service.scheduler.error = None
    await reconciler._follow_classes()
    assert reconciler.classes.hashes.keys() == {"default", "two"}
    assert fleet.views.status()["unprepared_classes"] == {}
    service.write(more=refused, rest=class_two(""))
    await service.reloader.reload()
    assert reconciler.classes.hashes.keys() == {"two"}
    assert fleet.views.status()["unprepared_classes"] == {"default": "no such pool"}
    service.write(more=refused, rest="rollout { at_once = 7 }")
    await service.reloader.reload()
    assert reconciler.classes.hashes.keys() == set()
    assert reconciler.classes.specs.keys() == {"default"}


async def test_a_class_that_comes_or_goes(service: Service) -> None:
    """A new class may be used immediately; a removed one may not, and stops nothing."""
    assert service.served_api.fleet.classes == frozenset({"default"})
    two = 'agent_class "two" {\n probe "tcp" { port = 81 }\n}'
    service.write(rest=two)
    assert (await service.reloader.reload()).changed == ("agent_class.two added",)
    assert service.served_api.fleet.classes == frozenset({"default", "two"})
    assert service.reloader.reconciler.classes.specs.keys() == {"default", "two"}
    service.write()
    assert (await service.reloader.reload()).changed == ("agent_class.two removed",)
    assert service.reloader.reconciler.classes.specs.keys() == {"default"}
    assert service.reloader.reconciler.classes.hashes.keys() == {"default"}


async def test_nothing_that_a_reload_raises_ends_the_service(service: Service) -> None:
    """Even after an internal error the task continues, and the next reload works."""

    def broken() -> Settings:
        raise RecursionError

    read, service.reloader.load = service.reloader.load, broken
    task = asyncio.ensure_future(service.reloader.run())
    service.reloader.requested.set()
    while not service.reloader.problem:
        await asyncio.sleep(0)
    assert service.reloader.problem == "internal error: RecursionError"
    service.reloader.load = read
    service.reloader.requested.set()
    while service.reloader.problem:
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def test_a_reload_never_opens_the_api(tmp_path: Path) -> None:
    """A file that listens only on the local machine and requires no token leaves the API protected as it is: the
    address, like the rest, needs a restart."""
    guarded = {"listen": "0.0.0.0:1", "token_file": str(tmp_path / "token")}
    running = Settings.model_validate({"data_dir": "/x", "api": guarded})
    loaded = Settings.model_validate({"data_dir": "/x", "resync": "5s"})
    wanted = applicable(running, loaded)
    assert wanted.api == running.api
    assert wanted.resync == 5.0


def test_a_change_of_a_class_is_stated_in_words() -> None:
    """Numbers have their units, added and removed blocks are one change each, and no text that may be a secret
    appears."""

    def settings(**more: Any) -> AgentSpec:
        block = {"probe": [{"kind": "http", "port": 80}], "confirm": [{"kind": "icmp"}]} | more
        whole = {"data_dir": "/x", "agent_class": {"default": block}}
        return Settings.model_validate(whole).specs()["default"]

    before = settings(memory="96Mi")
    probes = [{"kind": "http", "port": 80, "interval": "10s", "path": "/secret"}]
    for more, said in (
        ({"memory": "80Mi"}, "memory 96Mi → 80Mi"),
        (
            {"memory": "96Mi", "probe": probes},
            "probe.http.interval 5s → 10s, probe.http.path changed",
        ),
        ({"memory": "96Mi", "confirm": []}, "confirm removed"),
        (
            {"memory": "96Mi", "confirm": [{"kind": "icmp"}, {"kind": "tcp", "port": 22}]},
            "confirm.tcp added",
        ),
        ({"memory": "96Mi", "variables": {"key": "s3cret"}}, "variables added"),
        ({"memory": "96Mi", "ttl": "60s"}, ""),
    ):
        after = settings(**more)
        assert words(before.settings, after.settings) == said
        assert (before.spec_hash == after.spec_hash) is (said == "")
    assert "s3cret" not in str(settings(variables={"key": "s3cret"}).settings)


async def test_relief_is_applied_and_ends_with_its_block(service: Service) -> None:
    """A new block `relief` is in force after the reload, and without the block no host is relieved any more."""
    rules: list[ReliefRules | None] = []
    service.reloader.relieve = rules.append
    block = 'relief {\n  signal "cpu" {\n    high = 0.5\n    low = 0.1\n  }\n}'
    service.write(rest=block)
    done = await service.reloader.reload()
    assert done.needs_restart == ()
    assert [one.partition(" ")[0] for one in done.changed] == ["relief"]
    service.write()
    await service.reloader.reload()
    assert rules == [ReliefRules({Resource.CPU: PressureThresholds(50.0, 10.0)}), None]
