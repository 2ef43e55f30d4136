"""Where the log of an agent is, backend by backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from nomad_watchdog.errors import NotFoundError, TerminalError, UserError

if TYPE_CHECKING:
    from nomad_watchdog.config.settings import Settings

MAX_BYTES: Final = 1024 * 1024
MAX_LINES: Final = 100_000


def local_log(home: Path) -> str:
    """The file of a local agent, and the old one before it. Raises NotFoundError or UserError."""
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
        raise NotFoundError(f"no log at {home}; is this the machine that its agent runs on?")
    return "".join(found)


async def nomad_log(settings: Settings, allocation: str, task: str = "agent") -> str:
    """What Nomad has collected of a task, the last MAX_BYTES. Raises TerminalError when it collects nothing."""
    from nomad_watchdog.clients.nomad import NomadClient
    from nomad_watchdog.daemon.factory import nomad_settings

    client = NomadClient(nomad_settings(settings))
    asked = {
        "task": task,
        "type": "stderr",
        "plain": "true",
        "origin": "end",
        "offset": str(MAX_BYTES),
    }
    try:
        return await client.text(f"/v1/client/fs/logs/{allocation}", "read-logs", asked)
    except (NotFoundError, UserError) as error:
        raise TerminalError(
            "Nomad has no log of this agent: the shipped job has `logs { disabled = true }`, which saves each"
            f" node a process an agent; a template of yours may say false ({error})"
        ) from error
    finally:
        await client.close()


async def kubernetes_log(settings: Settings, slug: str) -> str:
    """What the kubelet has of the newest pod of a device, the last MAX_BYTES. Raises NotFoundError when there
    is no pod."""
    from nomad_watchdog.clients.kubernetes import KubernetesClient
    from nomad_watchdog.daemon.factory import kubernetes_settings
    from nomad_watchdog.schedulers.kubernetes.namespaces import newest_pod

    client = KubernetesClient(kubernetes_settings(settings))
    try:
        path = await newest_pod(
            client, settings.kubernetes.namespace, settings.kubernetes.namespaces, slug
        )
        asked = {"container": "agent", "limitBytes": str(MAX_BYTES), "tailLines": str(MAX_LINES)}
        return await client.text(f"{path}/log", asked)
    finally:
        await client.close()
