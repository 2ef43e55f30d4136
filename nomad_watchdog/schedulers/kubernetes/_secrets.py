"""The Secret with the credential of one agent. It is created before the workload and deleted with it."""

from __future__ import annotations

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.clients.kubernetes_objects import KubernetesObject
from nomad_watchdog.schedulers.kubernetes.names import Ref
from nomad_watchdog.schedulers.kubernetes.objects import expecting


def secret_name(ref: Ref, epoch: int) -> str:
    """One Secret per epoch, so that a late start does not overwrite the credential of the accepted agent."""
    return f"{ref.name}-{epoch}"


def _path(ref: Ref, epoch: int) -> str:
    return f"/api/v1/namespaces/{ref.namespace}/secrets/{secret_name(ref, epoch)}"


class AgentSecret:
    """The control plane may write Secrets but not read them, so it detects existing ones only by conflicts.

    `body`: None for an agent without a credential; then no Secret is written."""

    def __init__(self, client: KubernetesClient, ref: Ref, body: KubernetesObject | None) -> None:
        self._client = client
        self._ref = ref
        self._path = _path(ref, ref.epoch)
        self._body = body
        self._put = False

    async def put(self, *, new: bool) -> None:
        """Write it, without an owner yet. Later calls have no effect.

        `new`: raises ConflictError if a Secret of this name exists, which may already have an owner or belong to
        another installation."""
        if self._body is None or self._put:
            return
        await self._client.apply(self._path, expecting(self._body, None) if new else self._body)
        self._put = True

    async def set_owner(self, body: KubernetesObject, workload: KubernetesObject) -> None:
        """Make the workload its owner, so that the garbage collector deletes both together. `body`: what was
        applied; it has the kind, which differs in `workload` when only metadata was read."""
        if self._body is None:
            return
        self._put = False  # from now on it must not be deleted here
        reference = {
            "apiVersion": body["apiVersion"],
            "kind": body["kind"],
            "name": workload["metadata"]["name"],
            "uid": workload["metadata"]["uid"],
        }
        meta = {**self._body["metadata"], "ownerReferences": [reference]}
        await self._client.apply(self._path, {**self._body, "metadata": meta})

    async def delete(self, *, any_writer: bool = False) -> None:
        """Delete it if it was written here and has no workload. `any_writer`: also if another replica wrote it."""
        if self._put or (any_writer and self._body is not None):
            await self._client.delete(self._path)
            self._put = False

    async def delete_earlier(self, epoch: int) -> None:
        """Delete the Secret of an earlier epoch."""
        if self._body is not None:
            await self._client.delete(_path(self._ref, epoch))
