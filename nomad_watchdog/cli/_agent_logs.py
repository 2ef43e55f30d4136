"""Reads the log of an agent, per backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from nomad_watchdog.errors import NotFoundError, TerminalError, UserError

if TYPE_CHECKING:
    from nomad_watchdog.config.settings import Settings

MAX_BYTES: Final = 1024 * 1024
MAX_LINES: Final = 100_000


def local_log(home: Path) -> str:
    """The log files of a local agent, the older one first. Raises NotFoundError or UserError."""
    found = []
    for name in ("agent.log.1", "agent.log"):
        try:
            with (home / name).open("rb") as file:
                found.append(file.read(2 * MAX_BYTES).decode(errors="replace"))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{home / name}: {error.strerror}") from error
    if not found:
        raise NotFoundError(f"no log at {home}; does its agent run on this machine?")
    return "".join(found)


async def nomad_log(settings: Settings, allocation: str, task: str = "agent") -> str:
    """The last MAX_BYTES of the log of a task. Raises TerminalError if Nomad collects no logs."""
    from nomad_watchdog.clients.nomad import NomadClient
    from nomad_watchdog.daemon.factory import nomad_settings

    client = NomadClient(nomad_settings(settings))
    query = {
        "task": task,
        "type": "stderr",
        "plain": "true",
        "origin": "end",
        "offset": str(MAX_BYTES),
    }
    try:
        return await client.text(f"/v1/client/fs/logs/{allocation}", "read-logs", query)
    except (NotFoundError, UserError) as error:
        raise TerminalError(
            "Nomad has no log of this agent: the shipped job has `logs { disabled = true }`, which saves one process "
            f"per agent on each node; set it to false in your own template ({error})"
        ) from error
    finally:
        await client.close()


async def kubernetes_log(settings: Settings, slug: str) -> str:
    """The last MAX_BYTES of the log of the newest pod of a device. Raises NotFoundError without a pod."""
    from nomad_watchdog.clients.kubernetes import KubernetesClient
    from nomad_watchdog.daemon.factory import kubernetes_settings
    from nomad_watchdog.schedulers.kubernetes.namespaces import newest_pod

    client = KubernetesClient(kubernetes_settings(settings))
    try:
        path = await newest_pod(
            client, settings.kubernetes.namespace, settings.kubernetes.namespaces, slug
        )
        query = {"container": "agent", "limitBytes": str(MAX_BYTES), "tailLines": str(MAX_LINES)}
        return await client.text(f"{path}/log", query)
    finally:
        await client.close()
