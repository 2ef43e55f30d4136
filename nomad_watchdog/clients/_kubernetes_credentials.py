"""The current token or certificate, which is read again or requested again when necessary."""

from __future__ import annotations

import asyncio
import json
import math
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog import text_files
from nomad_watchdog.clients._kubernetes_settings import ExecPlugin, KubernetesAccess
from nomad_watchdog.clock import Clock
from nomad_watchdog.errors import TransientError, UserError, WatchdogError
from nomad_watchdog.secret_values import know

REREAD_S: Final = 60.0
"""Interval at which a token file is read again. The kubelet rotates it well before it expires."""
EARLY_S: Final = 10.0
"""A plugin is run again this time before its credential expires."""
_PLUGIN_S: Final = 60.0
RETRY_S: Final = 5.0
"""Minimum interval between runs of a plugin that failed or returned the refused credential again, so that concurrent
calls share one result."""


@dataclass(frozen=True, slots=True)
class Credential:
    """`cert` and `key`: PEM of a client certificate; empty = that of the settings."""

    token: str = ""
    cert: str = ""
    key: str = ""


class Credentials:
    """`current` before each call; `refused` after a 401."""

    def __init__(self, settings: KubernetesAccess, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        know(settings.token)
        self._known = Credential(token=settings.token)
        self._good_until: float | None = None
        self._failure: WatchdogError | None = None
        self._failed_at = -math.inf
        self._refused_at = -math.inf
        self._lock = asyncio.Lock()

    async def current(self) -> Credential:
        """Raises UserError when the file or the plugin contains no credential, TransientError when the plugin hangs."""
        if not self._changes:
            return self._known
        async with self._lock:
            if self._good_until is None or self._clock.wall() >= self._good_until:
                await self._renew()
        return self._known

    async def refused(self, used: Credential) -> bool:
        """Whether there is a new credential, other than the refused one."""
        if not self._changes:
            return False
        async with self._lock:
            if self._known == used and not self._is_recent(self._refused_at):
                await self._renew()
                if self._known == used and self._settings.exec_plugin:
                    self._refused_at = self._clock.monotonic()
            return self._known != used

    @property
    def _changes(self) -> bool:
        return bool(self._settings.exec_plugin or self._settings.token_file)

    async def _renew(self) -> None:
        plugin = self._settings.exec_plugin
        if plugin is not None:
            await self._run(plugin)
            return
        path = self._settings.token_file
        token = await asyncio.to_thread(text_files.token, "kubernetes token file", path)
        self._known = Credential(token=token)
        self._good_until = self._clock.wall() + REREAD_S

    async def _run(self, plugin: ExecPlugin) -> None:
        if self._failure is not None and self._is_recent(self._failed_at):
            raise type(self._failure)(*self._failure.args)
        try:
            self._known, self._good_until = await _run_plugin(plugin, self._settings)
            know(self._known.token, rotates=True)
        except WatchdogError as error:
            self._failure, self._failed_at = error, self._clock.monotonic()
            raise
        self._failure = None

    def _is_recent(self, at: float) -> bool:
        return self._clock.monotonic() - at < RETRY_S


async def _run_plugin(plugin: ExecPlugin, settings: KubernetesAccess) -> tuple[Credential, float]:
    spec: dict[str, object] = {"interactive": False}
    if plugin.cluster_info:
        spec["cluster"] = {"server": settings.server}
    info = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": spec}
    env = {**os.environ, **dict(plugin.env), "KUBERNETES_EXEC_INFO": json.dumps(info)}
    name = Path(plugin.command).name
    try:
        child = await asyncio.create_subprocess_exec(
            plugin.command,
            *plugin.args,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # may contain secrets (S10)
        )
    except OSError as error:
        raise UserError(f"kubernetes: the credential plugin {name}: {error.strerror}") from error
    try:
        async with asyncio.timeout(_PLUGIN_S):
            out, _ = await child.communicate()
    except TimeoutError:
        raise TransientError(
            f"kubernetes: the credential plugin {name} did not finish within {_PLUGIN_S:.0f} s"
        ) from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        raise TransientError(
            f"kubernetes: the credential plugin {name} exited with {child.returncode}"
        )
    return _parse(out, name)


def _parse(out: bytes, name: str) -> tuple[Credential, float]:
    wrong = f"kubernetes: the credential plugin {name} printed no ExecCredential"
    try:
        status = loads(out)["status"]
        expires = status.get("expirationTimestamp")
        # without an expiration it is valid until the server refuses it
        until = datetime.fromisoformat(expires).timestamp() - EARLY_S if expires else float("inf")
        found = Credential(
            str(status.get("token") or ""),
            str(status.get("clientCertificateData") or ""),
            str(status.get("clientKeyData") or ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(wrong) from None
    if not (found.token or (found.cert and found.key)):
        raise UserError(f"{wrong} with a token or a certificate")
    return found, until
