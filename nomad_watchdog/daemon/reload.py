"""Reloads the configuration, on SIGHUP or through the API, and applies what can be applied at run time.

An invalid configuration changes nothing. Settings that can't be applied at run time keep their value, and are
reported until the service is restarted or the file has the old value again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.api.auth import Authenticator, authenticator_of
from nomad_watchdog.api.services import Reloaded
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.config.settings_text import flat
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.inventory import InventoryController
from nomad_watchdog.core.relief import ReliefRules
from nomad_watchdog.core.settings_diff import differences
from nomad_watchdog.daemon import systemd
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.schedulers.multi import MultiScheduler

log = logging.getLogger(__name__)

_WHOLE: Final = (
    "agent_class",
    "agents",
    "presence",
    "mass_change",
    "rollout",
    "relief",
    "incident",
    "resync",
    "inventory",
)
"""Blocks and settings that are applied at run time."""
_PARTS: Final = {
    "api": (
        "token",
        "token_file",
        "webhook_secrets_file",
        "rate",
        "burst",
        "read_share",
        "read_burst",
        "streams_per_token",
    ),
    "nomad": ("drain", "leave_ineligible"),
    "kubernetes": ("leave_cordoned",),
    "retry": ("initial", "max", "starts_per_hour"),
    "log": ("level",),
}
"""Blocks of which only these settings are applied at run time."""
_SECRET_BLOCKS: Final = ("agent_class", "agent_pool")
"""Blocks whose text may contain secrets, and is hidden."""
MAX_LISTED: Final = 50
"""Changes that one event lists."""


def applicable(running: Settings, loaded: Settings) -> Settings:
    """The running settings, updated with those of `loaded` that can be applied at run time."""
    update: dict[str, object] = {name: getattr(loaded, name) for name in _WHOLE}
    for block, names in _PARTS.items():
        new = getattr(loaded, block)
        part = {name: getattr(new, name) for name in names}
        update[block] = getattr(running, block).model_copy(update=part)
    update["api"] = _applicable_api(running, loaded)
    return running.model_copy(update=update)


def _applicable_api(running: Settings, loaded: Settings) -> ApiSettings:
    part = {name: getattr(loaded.api, name) for name in _PARTS["api"]}
    if running.backend == "local" and not running.api.agent_key_file:
        # Agents on this machine use the token file that they were started with.
        part["token_file"] = running.api.token_file
    api = running.api.model_copy(update=part)
    # New tokens and the old address, for example, could together remove authentication from the API.
    return running.api if any(api.misfits()) else api


def warn_of_old_names(settings: Settings) -> None:
    """Log each setting that was given under its old name."""
    for reason in settings.deprecated:
        log.warning("deprecated setting", extra={"reason": reason})


def described(settings: Settings) -> dict[str, str]:
    """All settings as text by dotted name."""
    shown = flat(settings, hide_text=False)
    hidden = flat(settings, hide_text=True)
    return {
        name: hidden[name] if name.partition(".")[0] in _SECRET_BLOCKS else text
        for name, text in shown.items()
    }


@dataclass(slots=True)
class Reloader:
    """Reloads the configuration of one service. `load`: reads and checks it; raises UserError."""

    settings: Settings
    """In force."""
    load: Callable[[], Settings]
    reconciler: Reconciler
    scheduler: MultiScheduler
    inventory: InventoryController
    authenticator: Authenticator
    metrics: Metrics
    requested: asyncio.Event = field(default_factory=asyncio.Event)
    """Set it to reload the configuration (SIGHUP)."""
    renew: Callable[[], None] = lambda: None
    """Also rereads the certificates."""
    relieve: Callable[[ReliefRules | None], None] = lambda _rules: None
    """Applies the rules of relief."""
    problem: str = ""
    """Why the last reload changed nothing; "" = it succeeded."""
    needs_restart: tuple[str, ...] = ()
    _reloaded_at: float | None = None
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.reconciler.fleet.views.add_status(self.status)

    async def run(self) -> None:
        """Reload whenever it is requested, until cancelled. Errors of a reload are not raised."""
        while True:
            await self.requested.wait()
            self.requested.clear()
            self.renew()
            self.inventory.reread()
            ready = self.reconciler.fleet.readiness.event.is_set()
            if ready:
                systemd.reloading(self.reconciler.fleet.clock.monotonic())
            try:
                await self.reload()
            except WatchdogError:
                pass  # reported in the log, the events, the metrics and the status
            except Exception:  # the signal's boundary: a bug must not end the service
                log.exception("reload crashed")
            if ready:
                systemd.ready()

    async def reload(self) -> Reloaded:
        """Read the configuration and apply it. Raises UserError or TerminalError if it is invalid or the scheduler
        rejects it; then nothing has changed."""
        async with self._turn:
            try:
                done = await self._reload()
            except WatchdogError as error:
                self._failed(str(error))
                raise
            except Exception as error:
                self._failed(f"internal error: {type(error).__name__}")
                raise
        self.problem = ""
        self.needs_restart = done.needs_restart
        self._reloaded_at = self.reconciler.fleet.clock.monotonic()
        self.metrics.config(problem=False, restart=len(done.needs_restart))
        if done.changed or done.needs_restart:
            self._add_event("config.reloaded", str(done), done)
        log.info(
            "configuration reloaded",
            extra={"changed": list(done.changed), "needs_restart": list(done.needs_restart)},
        )
        return done

    async def _reload(self) -> Reloaded:
        loaded = await asyncio.to_thread(self.load)
        warn_of_old_names(loaded)
        wanted = applicable(self.settings, loaded)
        specs, unreadable = await asyncio.to_thread(wanted.readable_specs)
        place = await asyncio.to_thread(wanted.placer)
        authenticator = await asyncio.to_thread(authenticator_of, wanted.api)
        fleet, before = self.reconciler.fleet, self.settings
        limits = wanted.limits()
        was = fleet.limits
        self.scheduler.adapt_by(wanted.spec_on)
        fleet.configure(limits)
        try:
            in_force = self.reconciler.classes.in_force
            waits = bool(unreadable or self.reconciler.classes.unprepared or in_force.differs)
            strategies = wanted.strategies()
            waits = waits or strategies != before.strategies()
            if waits or limits != was or specs != in_force.configured:
                await self.reconciler.classes.configure(
                    specs,
                    read_specs=lambda: asyncio.to_thread(wanted.readable_specs),
                    unreadable=unreadable,
                    place=place,
                    strategies=strategies,
                )
        except BaseException:
            self.scheduler.adapt_by(before.spec_on)
            fleet.configure(was)
            raise
        self.reconciler.informer.look_every(limits.resync_s)
        self.authenticator.apply_settings_of(authenticator)
        self.inventory.configure(wanted.inventory, frozenset(wanted.agent_class))
        logging.getLogger().setLevel(wanted.log.level.upper())
        self.relieve(wanted.relief_rules())
        self.settings = wanted
        return Reloaded(
            tuple(differences(described(before), described(wanted))),
            tuple(differences(described(wanted), described(loaded))),
            dict(self.reconciler.classes.unprepared),
        )

    def _failed(self, problem: str) -> None:
        problem = self.problem = "; ".join(problem.splitlines())
        self.metrics.config(problem=True, restart=len(self.needs_restart))
        log.error("configuration not reloaded; nothing has changed", extra={"reason": problem})
        self._add_event("config.rejected", f"the configuration was not reloaded: {problem}", None)

    def _add_event(self, kind: str, text: str, done: Reloaded | None) -> None:
        fleet = self.reconciler.fleet
        data: dict[str, object] = {}
        if done is not None:
            data = {
                "changed": list(done.changed[:MAX_LISTED]),
                "needs_restart": list(done.needs_restart[:MAX_LISTED]),
            }
        fleet.events.note_fleet(kind, text, data)

    def status(self) -> dict[str, object]:
        """The part of the status about the configuration."""
        now = self.reconciler.fleet.clock.monotonic()
        at = self._reloaded_at
        return {
            "config": {
                "problem": self.problem,
                "needs_restart": list(self.needs_restart),
                "reloaded_s": None if at is None else round(now - at, 1),
            }
        }
